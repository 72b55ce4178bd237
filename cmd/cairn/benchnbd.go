package main

import (
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chaos/bench"
)

func benchNBDCommand() *cobra.Command {
	var out outputFlag
	var each time.Duration
	var rounds int
	cmd := &cobra.Command{
		Use:     "nbd",
		Short:   "Measure the NBD server alone beside nbdkit and qemu-nbd",
		Example: "  cairn bench nbd\n  cairn bench nbd --rounds 1 --each 2s -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return bench.RunNBD(cmd.Context(), bench.Config{Out: os.Stdout, Talk: os.Stderr, JSON: out.format == "json", Each: each, Rounds: rounds})
		},
	}
	out.register(cmd)
	cmd.Flags().DurationVar(&each, "each", 5*time.Second, "length of one run of one load")
	cmd.Flags().IntVar(&rounds, "rounds", 3, "rounds of every load on every server; medians are shown")
	return cmd
}
