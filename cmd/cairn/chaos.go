package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chaos/bench"
	"github.com/cairnstore/cairn/chaos/demo"
)

func demoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Show the main job on this machine: a guest on a replicated volume, and processes killed under it",
		Long: `Show the main job on this machine: a cluster of real processes, a real guest whose disk
is a replicated volume, and processes killed under it. Needs root, QEMU, e2fsprogs and,
the first time, Debian's package archive for the guest's kernel. Leaves nothing running.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			return demo.Run(cmd.Context(), demo.Config{Bin: exe, Out: os.Stdout})
		},
	}
}

func benchCommand() *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "bench", Short: "Measure this machine side by side with qemu-nbd", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			return bench.Run(cmd.Context(), bench.Config{Bin: exe, Out: os.Stdout, Talk: os.Stderr, JSON: out.format == "json"})
		},
	}
	out.register(cmd)
	return cmd
}
