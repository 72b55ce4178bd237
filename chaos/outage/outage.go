// Package outage measures what outages of real processes cost the clients of a
// volume: how long they wait, what is sent to catch up, and that nothing else
// happens to them.
//
// Duty: run one kind of outage again and again on a real cluster under a
// verified load, take the times, and judge the histories with chaos/check.
// Floor: F5. It breaks nothing but processes, and packets of its own network
// namespace; it measures no throughput (chaos/bench does).
package outage

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Config says what to measure. Zero fields get the defaults named.
type Config struct {
	Bin    string    // the cairn binary
	Out    io.Writer // the result
	Talk   io.Writer // progress (none)
	JSON   bool      // the result as JSON instead of a table
	Only   []string  // names of outages (all)
	Rounds int       // rounds of each outage (its own number, below)
	Seed   uint64    // of the load (1)
}

// Row is the result of one kind of outage.
type Row struct {
	Name   string    `json:"name"`
	Rounds int       `json:"rounds"`
	What   string    `json:"what"` // what Each are, with the unit
	Each   []float64 `json:"each"`
	P50    float64   `json:"p50"`
	P95    float64   `json:"p95"`
	Max    float64   `json:"max"`
	Target string    `json:"target"`
	Met    bool      `json:"met"`
	Load   string    `json:"load"` // what the load did meanwhile
}

// kind is one kind of outage.
type kind struct {
	name   string
	about  string
	rounds int    // how many its figure asks for
	what   string // unit and meaning of each round's figure
	target string
	met    func(r Row) bool
	run    func(ctx context.Context, l *lab) error // adds one figure a round
}

const stallMs = "longest answer, ms"

// kinds are all outages, in the order in which they are shown.
var kinds = []kind{
	{"kill", "kill -9 of a replica's process; the leader of the metadata lives", 100, stallMs, "p50 ≤ 25, p95 < 100, max < 500",
		func(r Row) bool { return r.P50 <= 25 && r.P95 < 100 && r.Max < 500 }, killReplica},
	{"kill-leader", "kill -9 of a replica and of the metadata's leader", 20, stallMs, "max < 4000",
		func(r Row) bool { return r.Max < 4000 }, killReplicaAndLeader},
	{"stop", "SIGSTOP of a replica's process", 20, stallMs, "max < 1500",
		func(r Row) bool { return r.Max < 1500 }, stopReplica},
	{"cut", "a replica's packets vanish", 20, stallMs, "max < 1500",
		func(r Row) bool { return r.Max < 1500 }, cutReplica},
	{"kill-all", "kill -9 of all hosts' processes, the gateway's too", 20, "first answer after, ms", "max ≤ 10000",
		func(r Row) bool { return r.Max <= 10000 }, killAll},
	{"power", "all hosts die and come back under another boot id", 5, "first answer after the last is back, ms", "max ≤ 10000",
		func(r Row) bool { return r.Max <= 10000 }, powerCut},
	{"frozen-gateway", "SIGSTOP of a gateway for 30 s; its volumes are attached elsewhere; it goes on", 10, "late writes and stale reads, of 20 volumes", "0",
		func(r Row) bool { return r.Max == 0 }, frozenGateway},
	{"dead-gateway", "kill -9 of a gateway with 64 operations in flight; attached elsewhere", 200, "blocks that changed between reads", "0",
		func(r Row) bool { return r.Max == 0 }, deadGateway},
	{"rejoin", "a replica away while 1 GiB is written; it and the gateway are killed while it catches up", 3, "sent to catch up, MiB", "≤ 1126",
		func(r Row) bool { return r.Max <= 1126 }, rejoin},
	{"rebuild", "a host is lost for good; its copies, 1 GiB, are made on another while the client goes on", 6, "the client's p99 meanwhile ÷ its p99 just before", "p50 ≤ 2",
		func(r Row) bool { return r.P50 <= 2 }, rebuild},
}

// Names are the outages' names with what they are.
func Names() []string {
	var out []string
	for _, k := range kinds {
		out = append(out, fmt.Sprintf("%-15s %s", k.name, k.about))
	}
	return out
}

// Run measures and prints. A missed target is part of the result, not an
// error; a broken promise is an error. Nothing is left running. It must run
// isolated (Isolate).
func Run(ctx context.Context, cfg Config) error {
	if cfg.Talk == nil {
		cfg.Talk = io.Discard
	}
	cfg.Seed = cmp.Or(cfg.Seed, 1)
	chosen, err := choose(cfg.Only)
	if err != nil {
		return err
	}
	var rows []Row
	for _, k := range chosen {
		row, err := measure(ctx, cfg, k)
		if err != nil {
			return fmt.Errorf("outage %s (seed %d): %w", k.name, cfg.Seed, err)
		}
		rows = append(rows, row)
	}
	return show(cfg, rows)
}

func choose(names []string) ([]kind, error) {
	if len(names) == 0 {
		return kinds, nil
	}
	var out []kind
	for _, name := range names {
		i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no outage %q; there are:\n  %s", name, strings.Join(Names(), "\n  "))
		}
		out = append(out, kinds[i])
	}
	return out, nil
}

// measure runs one kind of outage on a cluster of its own.
func measure(ctx context.Context, cfg Config, k kind) (row Row, err error) {
	rounds := cmp.Or(cfg.Rounds, k.rounds)
	l, err := newLab(ctx, cfg, k.name, rounds)
	if err != nil {
		return Row{}, err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	if err := k.run(ctx, l); err != nil {
		return Row{}, fmt.Errorf("%w\n%s", err, l.Tail())
	}
	row = Row{Name: k.name, Rounds: len(l.figures), What: k.what, Each: l.figures, Target: k.target, Load: l.account()}
	row.P50, row.P95, row.Max = quantile(l.figures, 0.5), quantile(l.figures, 0.95), quantile(l.figures, 1)
	row.Met = k.met(row)
	return row, l.judge(ctx)
}

// quantile is the smallest value that at least the share q of v does not exceed.
func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	at := int(q*float64(len(s))+0.999999) - 1
	return s[min(max(at, 0), len(s)-1)]
}

func show(cfg Config, rows []Row) error {
	if cfg.JSON {
		enc := json.NewEncoder(cfg.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(rows)
	}
	w := tabwriter.NewWriter(cfg.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "OUTAGE\tROUNDS\tP50\tP95\tMAX\tFIGURE\tTARGET\t\tLOAD")
	for _, r := range rows {
		verdict := "missed"
		if r.Met {
			verdict = "met"
		}
		fmt.Fprintf(w, "%s\t%d\t%.4g\t%.4g\t%.4g\t%s\t%s\t%s\t%s\n", r.Name, r.Rounds, r.P50, r.P95, r.Max, r.What, r.Target, verdict, r.Load)
	}
	return w.Flush()
}

// wait sleeps unless ctx ends first.
func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
