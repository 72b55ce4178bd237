package main

import (
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chaos/outage"
)

func benchOutageCommand() *cobra.Command {
	var out outputFlag
	var cfg outage.Config
	cmd := &cobra.Command{
		Use:   "outage [NAME...]",
		Short: "Measure how long clients wait when processes die, hang or vanish",
		Long: "Measure, on a cluster of real processes under a verified load, how long clients wait\nwhen processes die, hang or vanish. Needs root: it runs in a network namespace of its own.\n\n  " +
			strings.Join(outage.Names(), "\n  "),
		Example: "  cairn bench outage\n  cairn bench outage kill stop --rounds 10 -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			done, code, err := outage.Isolate()
			if err != nil {
				return err
			}
			if done {
				os.Exit(code)
			}
			if cfg.Bin, err = os.Executable(); err != nil {
				return err
			}
			cfg.Out, cfg.Talk, cfg.JSON, cfg.Only = os.Stdout, os.Stderr, out.format == "json", args
			return outage.Run(cmd.Context(), cfg)
		},
	}
	cmd.Flags().IntVar(&cfg.Rounds, "rounds", 0, "rounds of each outage (as many as its figure asks for)")
	cmd.Flags().Uint64Var(&cfg.Seed, "seed", 1, "of the load")
	out.register(cmd)
	return cmd
}
