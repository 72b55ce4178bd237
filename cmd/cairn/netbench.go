package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chaos/netlab"
	"github.com/cairnstore/cairn/netplane/bird"
)

// netBenchCommand measures what cuts of the storage network cost.
func netBenchCommand() *cobra.Command {
	var out outputFlag
	var protocols string
	var spines, hosts int
	cmd := &cobra.Command{
		Use:   "net",
		Short: "Measure what cuts of the storage network cost, with each routing protocol",
		Long: `Measure what cuts of the storage network cost, with each routing protocol: a lab of
namespaces with a cluster in it, under 8 UDP and 4 TCP flows and verified I/O on a volume
of three replicas. About two minutes a protocol. Needs root, BIRD and nft.`,
		Example: "  cairn bench net\n  cairn bench net --protocols bgp -o json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			exe, err := os.Executable()
			if err != nil {
				return err
			}
			dir, err := os.MkdirTemp("", "cairn-bench-net-")
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
			var all []netlab.Figures
			for _, p := range strings.Split(protocols, ",") {
				name, noBFD := strings.CutSuffix(p, "-nobfd")
				f, err := netlab.Measure(cmd.Context(), netlab.MeasureConfig{Bin: exe, Dir: filepath.Join(dir, p), Protocol: bird.Protocol(name), NoBFD: noBFD,
					Spines: spines, Hosts: hosts, Talk: os.Stderr})
				if err != nil {
					return err
				}
				all = append(all, f)
			}
			if out.format != "table" {
				return out.show(all, nil, nil)
			}
			return printFigures(all)
		},
	}
	out.register(cmd)
	cmd.Flags().StringVar(&protocols, "protocols", "bgp,rip,ospf,static,bgp-nobfd", "which, in order")
	cmd.Flags().IntVar(&spines, "spines", 2, "spines of the lab")
	cmd.Flags().IntVar(&hosts, "hosts", 4, "hosts of the lab")
	return cmd
}

func printFigures(all []netlab.Figures) error {
	var cuts, rest [][]string
	n := func(v float64) string { return fmt.Sprintf("%.0f", v) }
	for _, f := range all {
		name := string(f.Protocol)
		if f.BFD {
			name += " + BFD"
		}
		for _, c := range f.Cuts {
			cuts = append(cuts, []string{name, c.Cut, n(c.UDPms), n(c.TCPms), n(c.StorageMs), fmt.Sprint(c.Errors), fmt.Sprint(c.Excluded), n(c.HealedMs), n(c.HealUDPms)})
		}
		rest = append(rest, []string{name, n(f.ConvergedMs), n(f.SpreadPct), n(f.AddRouteMs), fmt.Sprint(f.LostByRoute),
			formatSize(f.BirdRSS), fmt.Sprintf("%.1f", f.BirdCPUPct), fmt.Sprintf("%.1f", f.HostCPUPct)})
	}
	if err := printTable([]string{"PROTOCOL", "CUT", "UDP MS", "TCP MS", "STORAGE MS", "ERRORS", "EXCLUDED", "HEALED MS", "UDP MS THEN"}, cuts); err != nil {
		return err
	}
	fmt.Println()
	return printTable([]string{"PROTOCOL", "CONVERGED MS", "SPREAD %", "ADD ROUTE MS", "LOST", "BIRD RSS", "BIRD CPU %", "HOST CPU %"}, rest)
}
