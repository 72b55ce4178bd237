package main

import (
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chaos/bench"
)

func benchMetaCommand() *cobra.Command {
	var out outputFlag
	var each time.Duration
	cmd := &cobra.Command{
		Use:     "meta",
		Short:   "Measure the metadata service alone: creations, allocations, reads, the loss of the leader",
		Example: "  cairn bench meta\n  cairn bench meta --each 10s -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			return bench.RunMeta(cmd.Context(), bench.Config{Bin: exe, Out: os.Stdout, Talk: os.Stderr, JSON: out.format == "json", Each: each})
		},
	}
	out.register(cmd)
	cmd.Flags().DurationVar(&each, "each", 5*time.Second, "length of each load")
	return cmd
}
