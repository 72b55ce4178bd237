package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chaos/bench"
)

func benchPlaceCommand() *cobra.Command {
	var out outputFlag
	cfg := bench.PlaceConfig{Out: os.Stdout, Talk: os.Stderr}
	cmd := &cobra.Command{
		Use: "place", Short: "Time placement decisions, and reads where a VM was placed and elsewhere", Args: cobra.NoArgs,
		Example: "  cairn bench place --hosts 10000",
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cfg.Bin, err = os.Executable(); err != nil {
				return err
			}
			cfg.JSON = out.format == "json"
			return bench.Place(cmd.Context(), cfg)
		},
	}
	cmd.Flags().IntVar(&cfg.Hosts, "hosts", 10_000, "hosts of the fleet that decisions are timed on")
	cmd.Flags().IntVar(&cfg.Reads, "reads", 4000, "reads of each end-to-end round")
	out.register(cmd)
	return cmd
}
