package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chaos/bench"
)

func benchStoreCommand() *cobra.Command {
	var out outputFlag
	var each time.Duration
	var rounds, overwrites int
	var dir string
	cmd := &cobra.Command{
		Use:     "store [writes|flushes|reads|misses|sequential|sustained|recovery …]",
		Short:   "Measure one chunk store beside the bare disk below it",
		Example: "  cairn bench store\n  cairn bench store recovery sustained --overwrites 2\n  cairn bench store flushes --dir /mnt/fast -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			debug.SetGCPercent(gcPercent) // as in a host
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			return bench.RunStore(cmd.Context(), bench.StoreConfig{Only: args, Overwrites: overwrites,
				Config: bench.Config{Bin: exe, Dir: dir, Out: os.Stdout, Talk: os.Stderr, JSON: out.format == "json", Each: each, Rounds: rounds}})
		},
	}
	out.register(cmd)
	cmd.Flags().DurationVar(&each, "each", 3*time.Second, "length of one run of one load")
	cmd.Flags().IntVar(&rounds, "rounds", 3, "rounds of every load; medians are shown")
	cmd.Flags().IntVar(&overwrites, "overwrites", 10, "how many times the sustained load overwrites the store")
	cmd.Flags().StringVar(&dir, "dir", "", "directory on the disk to measure (a fresh one of TMPDIR)")
	return cmd
}

// benchVictimCommand is the process that `cairn bench store` kills.
func benchVictimCommand() *cobra.Command {
	return &cobra.Command{
		Use: "store-victim PATH BYTES", Hidden: true, Args: cobra.ExactArgs(2),
		Short: "Fill a store until killed", Example: "  cairn bench store-victim /tmp/store 1073741824",
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := strconv.ParseInt(args[1], 10, 64)
			if err != nil {
				return fmt.Errorf("the size %q is not a number of bytes: %w", args[1], err)
			}
			return bench.RunStoreVictim(cmd.Context(), args[0], size)
		},
	}
}
