package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/chaos/place"
)

func placeSimulate() *cobra.Command {
	var out outputFlag
	var sizes []int
	var seed uint64
	var write, docs string
	var policies []string
	cmd := &cobra.Command{
		Use: "simulate TRACE", Short: "Replay a trace over the production scheduler, in virtual time", Args: cobra.ExactArgs(1),
		Long: fmt.Sprintf(`Replay a trace over the production scheduler, in virtual time, under every policy, and
under naive ones to compare with. TRACE is a
file, or "all", or some of the synthetic traces, with commas: %v.
Files that end in .json, with commas, are results of earlier runs (-o json), shown together.
The same seed gives the same placements.`, place.Names),
		Example: "  cairn place simulate churn-0.95 --hosts 1000\n  cairn place simulate mytrace.txt\n  cairn place simulate all --hosts 100,1000,10000 --docs docs",
		RunE: func(cmd *cobra.Command, args []string) error {
			if strings.HasSuffix(args[0], ".json") {
				rs, err := readResults(strings.Split(args[0], ","))
				if err != nil {
					return err
				}
				return out.showResults(rs, docs)
			}
			traces, err := traces(args[0], sizes, seed)
			if err != nil {
				return err
			}
			for _, name := range policies {
				if !slices.Contains(place.Contenders(), name) {
					return usagef("--policies %s: %s are possible", name, strings.Join(place.Contenders(), ", "))
				}
			}
			if write != "" {
				return writeTrace(write, traces[0])
			}
			rs, err := replayAll(cmd.Context(), traces, policies)
			if err != nil {
				return err
			}
			return out.showResults(rs, docs)
		},
	}
	f := cmd.Flags()
	f.IntSliceVar(&sizes, "hosts", []int{100}, "hosts of a synthetic trace; several for several runs")
	f.Uint64Var(&seed, "seed", 1, "where a synthetic trace's randomness comes from")
	f.StringSliceVar(&policies, "policies", place.Contenders(), "policies to replay it under; naive ones where VMs churn only")
	f.StringVar(&write, "write", "", "write the synthetic trace to this file instead of replaying it")
	f.StringVar(&docs, "docs", "", "write the table and the plots of docs/PLACEMENT.md below this folder")
	out.register(cmd)
	return cmd
}

// readResults reads what earlier runs have printed with -o json.
func readResults(files []string) (rs []*place.Result, err error) {
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		var some []*place.Result
		if err := json.Unmarshal(b, &some); err != nil {
			return nil, fmt.Errorf("results in %s: %w", f, err)
		}
		rs = append(rs, some...)
	}
	return rs, nil
}

// showResults shows results, or writes the documents made of them.
func (o *outputFlag) showResults(rs []*place.Result, docs string) error {
	if docs != "" {
		return writePlaceDocs(docs, rs)
	}
	var rows [][]string
	for _, r := range rs {
		rows = append(rows, r.Row())
	}
	return o.show(rs, place.Header, rows)
}

// replayAll replays, and leaves a replay behind when the user stops it: nothing
// is left but memory, and the process ends.
func replayAll(ctx context.Context, traces []func() (*place.Trace, error), names []string) ([]*place.Result, error) {
	var rs []*place.Result
	done := make(chan error, 1)
	go func() {
		for _, make := range traces {
			t, err := make()
			if err == nil {
				err = place.Compare(t, names, func(r *place.Result) { rs = append(rs, r); say("%v", r) })
			}
			if err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	select {
	case err := <-done:
		return rs, err
	case <-ctx.Done():
		return nil, fmt.Errorf("the simulation was interrupted: %w", ctx.Err())
	}
}

// traces are made one at a time: a large one is hundreds of megabytes.
func traces(name string, sizes []int, seed uint64) (out []func() (*place.Trace, error), err error) {
	names := strings.Split(name, ",")
	if name == "all" {
		names = place.Names
	} else if f, oerr := os.Open(name); oerr == nil {
		t, rerr := place.Read(f, filepath.Base(name))
		if err := errors.Join(rerr, f.Close()); err != nil {
			return nil, usagef("%w", err)
		}
		return append(out, func() (*place.Trace, error) { return t, nil }), nil
	}
	for _, n := range sizes {
		if n < 1 || n > 100_000 {
			return nil, usagef("--hosts %d: 1 to 100,000 are possible", n)
		}
		for _, name := range names {
			out = append(out, func() (*place.Trace, error) { return place.Synthetic(name, n, seed) })
		}
	}
	if len(out) == 0 {
		return nil, usagef("--hosts names no size")
	}
	if _, err := place.Synthetic(names[0], 1, seed); err != nil {
		return nil, usagef("%w", err)
	}
	return out, nil
}

func writeTrace(path string, make func() (*place.Trace, error)) error {
	t, err := make()
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(t.Write(f), f.Close())
}

// writePlaceDocs writes what docs/PLACEMENT.md shows.
func writePlaceDocs(dir string, rs []*place.Result) error {
	dir = filepath.Join(dir, "placement")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(dir, "results.md"))
	if err != nil {
		return err
	}
	if err := errors.Join(place.Markdown(f, rs), f.Close()); err != nil {
		return err
	}
	sizes := map[int]bool{}
	for _, r := range rs {
		sizes[r.Hosts] = true
	}
	for n := range sizes {
		for name, fig := range place.Figures {
			f, err := os.Create(filepath.Join(dir, fmt.Sprintf("%s-%d.svg", name, n)))
			if err != nil {
				return err
			}
			title := fmt.Sprintf("%s, %d hosts", fig.Title, n)
			if err := errors.Join(place.Plot(f, title, fig.Unit, rs, n, fig.Of), f.Close()); err != nil {
				return err
			}
		}
	}
	return nil
}
