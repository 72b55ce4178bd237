package main

import (
	"os"
	"strings"
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

// benchReaderCommand is what the benchmark of the metadata service starts.
func benchReaderCommand() *cobra.Command {
	return &cobra.Command{
		Use: "meta-reader ADDRS TIME", Hidden: true, Args: cobra.ExactArgs(2),
		Short: "Ask the metadata service and write how long each answer took", Example: "  cairn bench meta-reader 127.0.0.1:7100 5s",
		RunE: func(cmd *cobra.Command, args []string) error {
			each, err := time.ParseDuration(args[1])
			if err != nil {
				return err
			}
			return bench.ReadMeta(cmd.Context(), os.Stdout, strings.Split(args[0], ","), each)
		},
	}
}
