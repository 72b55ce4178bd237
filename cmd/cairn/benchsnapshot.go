package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chaos/bench"
)

func benchSnapshotCommand() *cobra.Command {
	var out outputFlag
	var size string
	var cfg bench.Config
	cmd := &cobra.Command{
		Use:   "snapshot",
		Short: "Measure snapshots and clones of a volume of 1 TiB while it is written",
		Long: `Measure, on a cluster of real processes, snapshots and clones of a volume of 1 TiB with all
its chunks, while it is written: what the commands take, and how long writes wait. Little
is written, but the file system must be as large as three such volumes; a sparse one does,
whose inode tables are there from the start and that goes around the page cache:

  truncate -s 5T big && mkfs.ext4 -q -i 1048576 -E lazy_itable_init=0,lazy_journal_init=0 big
  mount $(losetup --direct-io=on --find --show big) /mnt`,
		Example: "  cairn bench snapshot --dir /mnt\n  cairn bench snapshot --dir /mnt --rounds 3 -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cfg.Bin, err = os.Executable(); err != nil {
				return err
			}
			if cfg.SizeBytes, err = parseSize(size); err != nil {
				return err
			}
			cfg.Out, cfg.Talk, cfg.JSON = os.Stdout, os.Stderr, out.format == "json"
			return bench.RunSnapshot(cmd.Context(), cfg)
		},
	}
	cmd.Flags().StringVar(&cfg.Dir, "dir", "", "where the stores lie (default: TMPDIR)")
	cmd.Flags().IntVar(&cfg.Rounds, "rounds", 0, "rounds of each part (10)")
	cmd.Flags().StringVar(&size, "size", "1T", "of the volume; a block of each of its chunks is written")
	out.register(cmd)
	return cmd
}
