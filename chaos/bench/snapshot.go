package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/cairnstore/cairn/chaos/cluster"
	nbdclient "github.com/cairnstore/cairn/nbd/client"
)

// Snapshots and clones of a large volume while it is written: what the commands
// take, and what their clients wait. The volume is thin, and every chunk of it
// lives: one block of each is written first.

const (
	snapVolumeBytes = 1 << 40
	snapChunkBytes  = 64 << 20
	snapStoreBytes  = 3 << 39 // of each host; takes what is written only

	goldImageBytes = 1 << 30 // of the golden image; a quarter is data
	goldDataBytes  = 256 << 20

	snapTargetMs  = 100
	stallMaxMs    = 50
	snapRounds    = 10
	snapEach      = time.Second // of each window, beside what is done in it
	snapFillDepth = 64
	snapMergeMax  = 5 * time.Minute // of the layers of a deleted snapshot
)

// snapLoad is what runs meanwhile. Clients of a steady one write when they are
// due, and what waits behind a slow answer has waited since then; the others write
// as soon as they are answered.
type snapLoad struct {
	name  string
	depth int
	every time.Duration // of each client; 0: at once
}

var snapLoads = []snapLoad{
	{"2,000 writes/s", 8, 4 * time.Millisecond},
	{"all it takes, depth 32", 32, 0},
}

// SnapshotResult is what `cairn bench snapshot -o json` prints.
type SnapshotResult struct {
	SizeBytes uint64        `json:"sizeBytes"`
	Chunks    int           `json:"chunks"`
	Rounds    int           `json:"rounds"`
	Rows      []SnapshotRow `json:"rows"`
}

// SnapshotRow is one figure over the rounds.
type SnapshotRow struct {
	Load   string    `json:"load"`
	Name   string    `json:"name"`
	EachMs []float64 `json:"eachMs"`
	P50Ms  float64   `json:"p50Ms"`
	MaxMs  float64   `json:"maxMs"`
	Target float64   `json:"targetBelowMs,omitempty"` // of every round; none when absent
	Met    bool      `json:"met"`                     // true when there is no target
}

// The rows of each load, in the order in which they are shown.
var snapRows = []struct {
	name   string
	target float64
}{
	{"snapshot: flush before the cut", 0},
	{"snapshot: from there until it is there", snapTargetMs},
	{"snapshot: writes held", stallMaxMs},
	{"longest write, with a snapshot", stallMaxMs},
	{"longest write, without", 0},
	{"two volumes on two hosts at one moment: writes held", 0},
	{"longest write of both", 0},
	{"clone of it, the command", snapTargetMs},
	{"clone of a golden image, the command", snapTargetMs},
	{"the same, attached and read", 0},
	{"a command that only says its version", 0},
}

// snapBench is one benchmark in progress.
type snapBench struct {
	cfg Config
	*cluster.Cluster
	uri, other string                          // of the volume, and of a small one on another host
	each       map[string]map[string][]float64 // load, then row
}

// RunSnapshot measures and prints.
func RunSnapshot(ctx context.Context, cfg Config) (err error) {
	if cfg.Talk == nil {
		cfg.Talk = io.Discard
	}
	if cfg.Rounds == 0 {
		cfg.Rounds = snapRounds
	}
	if cfg.SizeBytes == 0 {
		cfg.SizeBytes = snapVolumeBytes
	}
	if cfg.SizeBytes < snapChunkBytes {
		return fmt.Errorf("a volume of %d bytes has no whole chunk of %d", cfg.SizeBytes, snapChunkBytes)
	}
	dir, err := os.MkdirTemp(cfg.Dir, "cairn-bench-")
	if err != nil {
		return fmt.Errorf("no directory for the disks: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &snapBench{cfg: cfg, each: map[string]map[string][]float64{}}
	if b.Cluster, err = cluster.Start(ctx, cluster.Config{Bin: cfg.Bin, Dir: filepath.Join(dir, "c"), Args: []string{"--store-size", fmt.Sprint(uint64(snapStoreBytes))}}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	if err := b.measure(ctx); ctx.Err() != nil {
		return fmt.Errorf("the benchmark was interrupted: %w", err)
	} else if err != nil {
		return err
	}
	return b.result().print(cfg)
}

func (b *snapBench) measure(ctx context.Context) error {
	if err := b.volumes(ctx); err != nil {
		return err
	}
	for round := range b.cfg.Rounds {
		fmt.Fprintf(b.cfg.Talk, "round %d of %d\n", round+1, b.cfg.Rounds)
		for _, l := range snapLoads {
			if b.each[l.name] == nil {
				b.each[l.name] = map[string][]float64{}
			}
			calm := func() error { return b.calm(ctx, l) }
			cut := func() error { return b.cut(ctx, l, round) }
			parts := []func() error{calm, cut}
			if round%2 == 1 { // who goes first changes every round
				slices.Reverse(parts)
			}
			for _, part := range append(parts, func() error { return b.group(ctx, l, round) }, func() error { return b.clones(ctx, l, round) }) {
				if err := part(); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// volumes makes the large volume, a small one on another host, and a golden image.
func (b *snapBench) volumes(ctx context.Context) (err error) {
	if err := b.CreateVolume(ctx, volumeName, b.cfg.SizeBytes, replicas); err != nil {
		return fmt.Errorf("%w, or see `cairn bench snapshot --help`", err)
	}
	if err := b.CreateVolume(ctx, "other", 1<<30, replicas); err != nil {
		return err
	}
	if b.uri, err = b.Attach(ctx, volumeName, gatewayHost); err != nil {
		return err
	}
	if b.other, err = b.Attach(ctx, "other", victimHost); err != nil {
		return err
	}
	fmt.Fprintf(b.cfg.Talk, "writing a block of each of %d chunks\n", b.chunks())
	if err := b.fill(ctx); err != nil {
		return err
	}
	gold := filepath.Join(b.Dir(), "gold.raw")
	data := make([]byte, goldDataBytes)
	for i := range data {
		data[i] = byte(i>>12 + 1)
	}
	if err := os.WriteFile(gold, data, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(gold, goldImageBytes); err != nil {
		return err
	}
	if _, err := b.Cairn(ctx, "volume", "import", "gold", gold); err != nil {
		return err
	}
	_, err = b.Cairn(ctx, "volume", "snapshot", "gold", "--name", "image")
	return err
}

// chunks is how many the large volume has.
func (b *snapBench) chunks() int { return int(b.cfg.SizeBytes / snapChunkBytes) }

// snapPlace is a block of a chunk; each chunk's lies elsewhere in it.
func snapPlace(chunk int) int64 {
	return int64(chunk)*snapChunkBytes + int64(chunk*7919%(snapChunkBytes/4096))*4096
}

// fill writes one block of every chunk.
func (b *snapBench) fill(ctx context.Context) error {
	dev, err := nbdclient.Dial(ctx, b.uri, nil)
	if err != nil {
		return err
	}
	var next atomic.Int64
	errs := make([]error, snapFillDepth)
	var wg sync.WaitGroup
	for w := range errs {
		wg.Go(func() {
			buf := make([]byte, 4096)
			for i := next.Add(1) - 1; i < int64(b.chunks()) && errs[w] == nil && ctx.Err() == nil; i = next.Add(1) - 1 {
				buf[0], buf[1] = byte(i), byte(i>>8)|1
				_, errs[w] = dev.WriteAt(buf, snapPlace(int(i)))
			}
		})
	}
	wg.Wait()
	return errors.Join(append(errs, ctx.Err(), dev.Flush(), dev.Close())...)
}

// under runs do while a load writes, with half of snapEach before and after it; it
// returns the longest write of the large volume, and with small, which writes the
// other one too, of both.
func (b *snapBench) under(ctx context.Context, l snapLoad, small bool, do func() error) (longest, both time.Duration, err error) {
	var stop atomic.Bool
	var wg sync.WaitGroup
	var large, little time.Duration
	var lerr, serr error
	wg.Go(func() { large, lerr = l.run(ctx, b.uri, b.chunks(), &stop) })
	if small {
		wg.Go(func() { little, serr = snapLoads[0].run(ctx, b.other, 8, &stop) })
	}
	time.Sleep(snapEach / 2)
	err = do()
	time.Sleep(snapEach / 2)
	stop.Store(true)
	wg.Wait()
	return large, max(large, little), errors.Join(err, lerr, serr)
}

// run writes single blocks of random chunks until it is stopped; longest is the
// longest any of them took, or was late.
func (l snapLoad) run(ctx context.Context, uri string, chunks int, stop *atomic.Bool) (longest time.Duration, err error) {
	dev, err := nbdclient.Dial(ctx, uri, nil)
	if err != nil {
		return 0, err
	}
	took, errs := make([]time.Duration, l.depth), make([]error, l.depth)
	var wg sync.WaitGroup
	began := time.Now()
	for w := range l.depth {
		wg.Go(func() {
			buf := make([]byte, 4096)
			due := began.Add(time.Duration(w) * l.every / time.Duration(l.depth))
			for !stop.Load() && errs[w] == nil {
				time.Sleep(time.Until(due))
				chunk := rand.IntN(chunks)
				buf[0], buf[1] = byte(chunk), byte(chunk>>8)|1
				_, errs[w] = dev.WriteAt(buf, snapPlace(chunk))
				took[w] = max(took[w], time.Since(due))
				if due = due.Add(l.every); l.every == 0 {
					due = time.Now()
				}
			}
		})
	}
	wg.Wait()
	return slices.Max(took), errors.Join(append(errs, dev.Close())...)
}

func (b *snapBench) add(l snapLoad, row int, ms float64) {
	name := snapRows[row].name
	b.each[l.name][name] = append(b.each[l.name][name], ms)
}

func inMs(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func (b *snapBench) calm(ctx context.Context, l snapLoad) error {
	longest, _, err := b.under(ctx, l, false, func() error { return nil })
	b.add(l, 4, inMs(longest))
	return err
}

// taken is what `cairn volume snapshot -o json` says.
type taken struct {
	FlushedMs float64 `json:"flushedMs"`
	CutMs     float64 `json:"cutMs"`
	HeldMs    float64 `json:"heldMs"`
}

func (b *snapBench) snapshot(ctx context.Context, name string, volumes ...string) (t taken, err error) {
	out, err := b.Cairn(ctx, append([]string{"volume", "snapshot", "create", "--name", name, "-o", "json"}, volumes...)...)
	if err != nil {
		return t, err
	}
	return t, json.Unmarshal([]byte(out), &t)
}

func snapName(l snapLoad, round int) string {
	return fmt.Sprintf("s%d-%d", l.depth, round)
}

func (b *snapBench) cut(ctx context.Context, l snapLoad, round int) error {
	var t taken
	longest, _, err := b.under(ctx, l, false, func() (err error) {
		t, err = b.snapshot(ctx, snapName(l, round), volumeName)
		return err
	})
	for i, ms := range []float64{t.FlushedMs, t.CutMs, t.HeldMs, inMs(longest)} {
		b.add(l, i, ms)
	}
	return err
}

func (b *snapBench) group(ctx context.Context, l snapLoad, round int) error {
	var t taken
	_, longest, err := b.under(ctx, l, true, func() (err error) {
		t, err = b.snapshot(ctx, "g"+snapName(l, round), volumeName, "other")
		return err
	})
	b.add(l, 5, t.HeldMs)
	b.add(l, 6, inMs(longest))
	if err != nil {
		return err
	}
	// Until its chunks are merged: the next window is to measure what it says.
	began := time.Now()
	_, err = b.CairnWithin(ctx, snapMergeMax, "volume", "snapshot", "rm", "--wait", volumeName+"@g"+snapName(l, round), "other@g"+snapName(l, round))
	fmt.Fprintf(b.cfg.Talk, "  its layers merged after %.1f s\n", time.Since(began).Seconds())
	return err
}

// clones are made while the large volume is written, and removed again.
func (b *snapBench) clones(ctx context.Context, l snapLoad, round int) error {
	_, _, err := b.under(ctx, l, false, func() error {
		began := time.Now()
		if _, err := b.Cairn(ctx, "volume", "clone", volumeName+"@"+snapName(l, round), "clone"); err != nil {
			return err
		}
		b.add(l, 7, inMs(time.Since(began)))
		began = time.Now()
		if _, err := b.Cairn(ctx, "volume", "clone", "gold@image", "vm"); err != nil {
			return err
		}
		b.add(l, 8, inMs(time.Since(began)))
		uri, err := b.Attach(ctx, "vm", "host-3")
		if err != nil {
			return err
		}
		dev, err := nbdclient.Dial(ctx, uri, nil)
		if err != nil {
			return err
		}
		buf := make([]byte, 4096)
		if _, err = dev.ReadAt(buf, 0); err == nil && buf[0] != 1 {
			err = errors.New("the clone does not show its golden image")
		}
		b.add(l, 9, inMs(time.Since(began)))
		began = time.Now()
		if _, verr := b.Cairn(ctx, "--version"); verr != nil {
			return errors.Join(err, verr, dev.Close())
		}
		b.add(l, 10, inMs(time.Since(began)))
		return errors.Join(err, dev.Close())
	})
	if err != nil {
		return err
	}
	if err := b.Detach(ctx, "vm"); err != nil {
		return err
	}
	for _, name := range []string{"vm", "clone"} {
		if _, err := b.Cairn(ctx, "volume", "rm", name, "--now"); err != nil {
			return err
		}
	}
	return nil
}

func (b *snapBench) result() *SnapshotResult {
	r := &SnapshotResult{SizeBytes: b.cfg.SizeBytes, Chunks: b.chunks(), Rounds: b.cfg.Rounds}
	for _, l := range snapLoads {
		for _, row := range snapRows {
			each := b.each[l.name][row.name]
			f := SnapshotRow{Load: l.name, Name: row.name, EachMs: each, P50Ms: median(each), MaxMs: slices.Max(each), Target: row.target}
			f.Met = row.target == 0 || f.MaxMs < row.target
			r.Rows = append(r.Rows, f)
		}
	}
	return r
}

func (r *SnapshotResult) print(cfg Config) error {
	if cfg.JSON {
		enc := json.NewEncoder(cfg.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	w := tabwriter.NewWriter(cfg.Out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "%d chunks of a volume of %d GiB live, three replicas, %d rounds\n", r.Chunks, r.SizeBytes>>30, r.Rounds)
	load := ""
	for _, f := range r.Rows {
		if f.Load != load {
			load = f.Load
			fmt.Fprintf(w, "\n%-52s\tp50 ms\tmax ms\ttarget\t\t\n", "written meanwhile: "+load)
		}
		target, verdict := "", ""
		if f.Target > 0 {
			target, verdict = fmt.Sprintf("< %g", f.Target), met(f.Met)
		}
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%s\t%s\t\n", f.Name+strings.Repeat(" ", max(0, 52-len([]rune(f.Name)))), f.P50Ms, f.MaxMs, target, verdict)
	}
	return w.Flush()
}
