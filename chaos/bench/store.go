package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"
)

// StoreConfig says how to measure one chunk store on this machine's disk.
type StoreConfig struct {
	Config
	Only       []string // names of figures to measure; none: all
	StoreBytes int64    // of the stores (4 GiB)
	Overwrites int      // the sustained load writes as many times the capacity (10)
	KillBytes  int64    // what the store holds whose process is killed (10 GiB)
}

func (c *StoreConfig) defaults() error {
	if c.StoreBytes == 0 {
		c.StoreBytes = 4 << 30
	}
	if c.Overwrites == 0 {
		c.Overwrites = 10
	}
	if c.KillBytes == 0 {
		c.KillBytes = 10 << 30
	}
	return c.Config.defaults()
}

// StoreFigure is one line of `cairn bench store`.
type StoreFigure struct {
	Name   string  `json:"name"`
	Value  float64 `json:"value"`
	Unit   string  `json:"unit"`
	CPUUs  float64 `json:"cpuUs"`            // per operation, of the whole process; 0: not counted
	Bare   float64 `json:"bare,omitempty"`   // the same of the bare disk, or before
	Ratio  float64 `json:"ratio,omitempty"`  // median of the rounds' ratios
	Target string  `json:"target,omitempty"` // what it has to reach
	Met    bool    `json:"met"`
}

// StoreResult is what `cairn bench store -o json` prints.
type StoreResult struct {
	StoreBytes int64         `json:"storeBytes"`
	Rounds     int           `json:"rounds"`
	RunS       float64       `json:"runSeconds"`
	Figures    []StoreFigure `json:"figures"`
}

// storeBench is one benchmark of a store in progress.
type storeBench struct {
	cfg StoreConfig
	dir string
	r   StoreResult
}

// storeGroup is some figures that share a store.
type storeGroup struct {
	name string
	run  func(*storeBench, context.Context) error
}

var storeGroups = []storeGroup{
	{"writes", (*storeBench).writes},
	{"flushes", (*storeBench).flushes},
	{"reads", (*storeBench).reads},
	{"misses", (*storeBench).misses},
	{"sequential", (*storeBench).sequential},
	{"sustained", (*storeBench).sustained},
	{"recovery", (*storeBench).recovery},
}

// RunStore measures one chunk store over a file, with its index pages in
// Badger, and the bare disk below in the same rounds. Nothing is left behind.
func RunStore(ctx context.Context, cfg StoreConfig) (err error) {
	if err := cfg.defaults(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(cfg.Dir, "cairn-bench-")
	if err != nil {
		return fmt.Errorf("no directory for the stores: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &storeBench{cfg: cfg, dir: dir, r: StoreResult{StoreBytes: cfg.StoreBytes, Rounds: cfg.Rounds, RunS: cfg.Each.Seconds()}}
	for _, only := range cfg.Only {
		if !b.known(only) {
			return fmt.Errorf("there are no figures named %q: writes, flushes, reads, misses, sequential, sustained and recovery can be measured", only)
		}
	}
	for _, g := range storeGroups {
		if !b.wanted(g.name) {
			continue
		}
		cfg.talk("store: %s", g.name)
		if err := g.run(b, ctx); ctx.Err() != nil {
			return fmt.Errorf("the benchmark was interrupted: %w", ctx.Err())
		} else if err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
	}
	return b.r.print(cfg.Config)
}

func (c *StoreConfig) talk(format string, args ...any) { fmt.Fprintf(c.Talk, format+"\n", args...) }

func (b *storeBench) known(name string) bool {
	for _, g := range storeGroups {
		if g.name == name {
			return true
		}
	}
	return false
}

func (b *storeBench) wanted(name string) bool {
	for _, only := range b.cfg.Only {
		if only == name {
			return true
		}
	}
	return len(b.cfg.Only) == 0
}

func (b *storeBench) add(f StoreFigure) { b.r.Figures = append(b.r.Figures, f) }

// rate is a figure that has to be high enough at low enough CPU.
func (b *storeBench) rate(name string, runs []loadResult, least, cpuMost float64) {
	f := StoreFigure{Name: name, Unit: "/s", Value: medianOf(runs, loadResult.perS), CPUUs: medianOf(runs, loadResult.cpuUs), Met: true}
	if least > 0 {
		f.Target, f.Met = fmt.Sprintf("≥ %.0f", least), f.Value >= least
	}
	if cpuMost > 0 {
		f.Target, f.Met = fmt.Sprintf("%s ≤ %.0f µs", f.Target, cpuMost), f.Met && f.CPUUs <= cpuMost
	}
	b.add(f)
}

// against is a figure that has to reach a part of another one, pair by pair.
func (b *storeBench) against(name, unit string, own, bare, cpu []float64, least float64) {
	ratios := make([]float64, len(own))
	for i := range own {
		ratios[i] = own[i] / bare[i]
	}
	f := StoreFigure{Name: name, Unit: unit, Value: median(own), Bare: median(bare), Ratio: median(ratios), CPUUs: median(cpu),
		Target: fmt.Sprintf("≥ %.2f of bare", least)}
	f.Met = f.Ratio >= least
	b.add(f)
}

func medianOf(runs []loadResult, f func(loadResult) float64) float64 {
	var v []float64
	for _, r := range runs {
		v = append(v, f(r))
	}
	return median(v)
}

func (r *StoreResult) print(cfg Config) error {
	if cfg.JSON {
		enc := json.NewEncoder(cfg.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	w := tabwriter.NewWriter(cfg.Out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "one chunk store of %d MiB and the bare disk below it, medians of %d rounds of %v\t\n\t\n",
		r.StoreBytes>>20, r.Rounds, time.Duration(r.RunS*float64(time.Second)))
	fmt.Fprintf(w, "figure\tvalue\tunit\tCPU µs\tbare\tratio\ttarget\t\t\n")
	for _, f := range r.Figures {
		verdict := "met"
		if f.Target == "" {
			verdict = ""
		} else if !f.Met {
			verdict = "missed"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", f.Name, figure(f.Value), f.Unit, figure(f.CPUUs), figure(f.Bare), figure(f.Ratio), f.Target, verdict)
	}
	return w.Flush()
}

// figure prints three digits or all before the point; nothing for zero.
func figure(v float64) string {
	switch {
	case v == 0:
		return ""
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func (b *storeBench) path(name string) string { return filepath.Join(b.dir, name) }
