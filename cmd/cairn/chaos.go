package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chaos/bench"
	"github.com/cairnstore/cairn/chaos/demo"
	"github.com/cairnstore/cairn/chaos/sim"
	"github.com/cairnstore/cairn/proto/status"
)

func demoCommand() *cobra.Command {
	return &cobra.Command{
		Example: "  cairn demo",
		Use:     "demo",
		Short:   "Show the main job on this machine: a guest on a replicated volume, and processes killed under it",
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
	cmd.AddCommand(benchNBDCommand(), benchMetaCommand(), benchOutageCommand(), netBenchCommand(), benchStoreCommand(), benchPlaceCommand(), benchSnapshotCommand(), benchVictimCommand(), benchReaderCommand())
	return cmd
}

func chaosCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "chaos", Short: "Break things on purpose, and check every promise"}
	cmd.AddCommand(chaosSimCommand(), chaosReplayCommand())
	return cmd
}

func chaosSimCommand() *cobra.Command {
	var cfg sim.Config
	var forever bool
	var out string
	cmd := &cobra.Command{
		Use:   "sim",
		Short: "Run a whole cluster in virtual time, with faults drawn from a seed",
		Long: `Run a whole cluster in virtual time on one thread: the real engine, stores and metadata
state, with faults drawn from the seed. A broken promise is made smaller, written to a
file and traced. The same seed gives the same state hash, always.`,
		Example: "  cairn chaos sim --seed 7 --steps 2000\n  cairn chaos sim --seed 1 --forever",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for ; cmd.Context().Err() == nil; cfg.Seed++ {
				r := sim.Run(cfg)
				fmt.Printf("seed %-8d hash %016x  ops %-6d faults %-4d virtual %-14s %s\n", cfg.Seed, r.Hash, r.Stats.Ops, r.Stats.FaultCount(), r.Stats.Virtual, r.Shape)
				if r.Failure != nil {
					return simFailed(r, out)
				}
				if !forever {
					return nil
				}
			}
			return nil
		},
	}
	cmd.Flags().Uint64Var(&cfg.Seed, "seed", 1, "where all randomness comes from")
	cmd.Flags().IntVar(&cfg.Steps, "steps", 2000, "client operations")
	cmd.Flags().BoolVar(&forever, "forever", false, "go on with the next seed until one fails")
	cmd.Flags().StringVar(&out, "out", "cairn-sim.replay", "file a failing run is written to")
	return cmd
}

// simFailed makes a failing run smaller, keeps it in a file and prints its end.
func simFailed(r *sim.Result, file string) error {
	fmt.Fprintf(os.Stderr, "%s is broken: %s\nlooking for a smaller run…\n", r.Failure.Promise, r.Failure.Text)
	small := sim.Minimize(r, 300)
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if err := errors.Join(sim.WriteReplay(f, small), f.Close()); err != nil {
		return err
	}
	return replaySim(small.Config, small.Faults, file)
}

func chaosReplayCommand() *cobra.Command {
	return &cobra.Command{
		Example: "  cairn chaos replay seed-458.json",
		Use:     "replay FILE",
		Short:   "Run again what a failing simulation has written, with a trace",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			cfg, err := sim.ReadReplay(f)
			if err := errors.Join(err, f.Close()); err != nil {
				return err
			}
			return replaySim(cfg, cfg.Faults, args[0])
		},
	}
}

// replaySim runs with a trace, prints it, and says how it ended.
func replaySim(cfg sim.Config, faults []sim.Fault, file string) error {
	cfg.Faults, cfg.Trace = faults, true
	r := sim.Run(cfg)
	if err := sim.Print(os.Stdout, r.Trace); err != nil {
		return err
	}
	if r.Failure != nil {
		return status.Errorf(status.Internal, "seed %d breaks %s at %v of virtual time: %s; `cairn chaos replay %s` shows it again", cfg.Seed, r.Failure.Promise, r.Failure.At, r.Failure.Text, file)
	}
	fmt.Printf("seed %d keeps every promise: hash %016x\n", cfg.Seed, r.Hash)
	return nil
}
