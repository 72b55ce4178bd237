package sim

import (
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// report prints what a failing run needs to be understood and replayed.
func report(t *testing.T, r *Result) {
	t.Helper()
	t.Errorf("seed %d (%s): %s at %v: %s\ncairn chaos sim --seed %d --steps %d shows it", r.Config.Seed, r.Shape, r.Failure.Promise, r.Failure.At, r.Failure.Text, r.Config.Seed, r.Config.Steps)
}

func envInt(name string, other int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return other
}

// TestSeeds runs CAIRN_SIM_SEEDS seeds on all processors, from CAIRN_SIM_SEED
// on: the same ones every time, so that a change is judged by itself; `make chaos`
// begins where nobody was. CAIRN_SIM_SECONDS ends it sooner, and CAIRN_SIM_DONE is a file that sums up slices of a long run.
func TestSeeds(t *testing.T) {
	seeds := 2000
	if testing.Short() {
		seeds = 100
	}
	first := envInt("CAIRN_SIM_SEED", 1)
	done := os.Getenv("CAIRN_SIM_DONE")
	sum := &totals{}
	first += sum.load(t, done)
	last := first + envInt("CAIRN_SIM_SEEDS", seeds) - 1
	fmt.Printf("seeds %d to %d\n", first, last)
	var next, bad atomic.Int64
	next.Store(int64(first))
	end := time.Now().Add(time.Duration(envInt("CAIRN_SIM_SECONDS", 86_400)) * time.Second)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for time.Now().Before(end) && bad.Load() < 5 {
				seed := next.Add(1) - 1
				if seed > int64(last) {
					return
				}
				r := Run(Config{Seed: uint64(seed)})
				mu.Lock()
				sum.add(r)
				if r.Failure != nil {
					bad.Add(1)
					report(t, r)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	fmt.Print(sum)
	sum.save(t, done)
	if sum.runs == 0 || sum.stats.Ops == 0 || sum.stats.FaultCount() == 0 {
		t.Error("nothing was tried")
	}
}

// totals are the figures of many runs.
type totals struct {
	runs  int
	stats Stats
}

// load reads what earlier slices of a long run have done; it returns how many
// seeds that were.
func (s *totals) load(t *testing.T, file string) int {
	t.Helper()
	if file == "" {
		return 0
	}
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var kept saved
	if err := gob.NewDecoder(f).Decode(&kept); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	s.runs, s.stats = kept.Runs, kept.Stats
	return s.runs
}

type saved struct {
	Runs  int
	Stats Stats
}

// save keeps the figures, unless a run has failed.
func (s *totals) save(t *testing.T, file string) {
	t.Helper()
	if file == "" || t.Failed() {
		return
	}
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(saved{s.runs, s.stats}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+".new", b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

func (s *totals) add(r *Result) {
	if s.stats.Faults == nil {
		s.stats.Faults, s.stats.Pairs = map[Kind]int{}, map[[2]Kind]int{}
	}
	s.runs++
	x := r.Stats
	s.stats.Begun += x.Begun
	s.stats.Ops += x.Ops
	s.stats.Unknown += x.Unknown
	s.stats.Attaches += x.Attaches
	s.stats.Confirmed += x.Confirmed
	s.stats.Moves += x.Moves
	s.stats.Snapshots += x.Snapshots
	s.stats.Deleted += x.Deleted
	s.stats.Merged += x.Merged
	s.stats.Rollbacks += x.Rollbacks
	s.stats.Shown += x.Shown
	s.stats.Clones += x.Clones
	s.stats.Flat += x.Flat
	s.stats.CloneOps += x.CloneOps
	s.stats.Events += x.Events
	s.stats.Shakes += x.Shakes
	s.stats.Virtual += x.Virtual
	for k, n := range x.Faults {
		s.stats.Faults[k] += n
	}
	for k, n := range x.Pairs {
		s.stats.Pairs[k] += n
	}
}

func (s *totals) String() string {
	var b strings.Builder
	x := s.stats
	fmt.Fprintf(&b, "seeds %d  operations %d, %d answered  unanswered %d  reads without a lease %d  attaches %d  copies moved %d  snapshots %d, %d deleted, %d layers merged, %d rolled back to, %d reads of them  clones %d, %d made flat, %d operations  events %d  virtual %v\nfaults %d:", s.runs, x.Begun, x.Ops, x.Unknown, x.Confirmed, x.Attaches, x.Moves, x.Snapshots, x.Deleted, x.Merged, x.Rollbacks, x.Shown, x.Clones, x.Flat, x.CloneOps, x.Events, x.Virtual.Round(time.Second), x.FaultCount())
	for _, k := range Kinds() {
		fmt.Fprintf(&b, " %s %d", k, x.Faults[k])
	}
	n := len(Kinds())
	fmt.Fprintf(&b, "\npairs of faults that met: %d of %d\n", len(x.Pairs), n*n)
	return b.String()
}

// The same seed gives the same run, to the last byte on every disk.
func TestSameSeedSameHash(t *testing.T) {
	for seed := uint64(1); seed <= 12; seed++ {
		a, b := Run(Config{Seed: seed, Steps: 800}), Run(Config{Seed: seed, Steps: 800, Trace: true})
		if a.Hash != b.Hash {
			t.Errorf("seed %d: hashes %016x and %016x", seed, a.Hash, b.Hash)
		}
		if c := Run(Config{Seed: seed, Steps: 800, Faults: a.Faults}); c.Hash != a.Hash {
			t.Errorf("seed %d: planned faults give %016x instead of %016x", seed, c.Hash, a.Hash)
		}
	}
	if a, b := Run(Config{Seed: 1, Steps: 300}), Run(Config{Seed: 2, Steps: 300}); a.Hash == b.Hash {
		t.Error("two seeds have the same hash")
	}
}

// A run survives its way through a file.
func TestReplayFile(t *testing.T) {
	r := Run(Config{Seed: 7, Steps: 600})
	var file bytes.Buffer
	if err := WriteReplay(&file, r); err != nil {
		t.Fatal(err)
	}
	cfg, err := ReadReplay(&file)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Faults) == 0 || !slices.Equal(cfg.Faults, r.Faults) {
		t.Fatalf("%d faults became %d", len(r.Faults), len(cfg.Faults))
	}
	if again := Run(cfg); again.Hash != r.Hash {
		t.Fatalf("the replay has hash %016x instead of %016x", again.Hash, r.Hash)
	}
	for _, bad := range []string{"", "seed x", "seed 1\nsteps 5\n  9 no-such-fault host 1 gate 1 for 1s arg 0"} {
		if _, err := ReadReplay(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is taken for a replay", bad)
		}
	}
}

// A run that loses every copy breaks a promise; of its many faults only those
// that matter are kept, and the smaller run fails alike from its file.
func TestMinimize(t *testing.T) {
	cfg := Config{Seed: 3, Steps: 600, unfair: true, shape: &shape{hosts: 3, replicas: 3, flushes: 9, zeros: 10}, Faults: []Fault{}}
	for i := range 12 {
		cfg.Faults = append(cfg.Faults, Fault{At: 20 * (i + 1), Kind: Reset, Host: i % 3, Gate: (i + 1) % 3})
	}
	for i := range 3 {
		cfg.Faults = append(cfg.Faults, Fault{At: 300, Kind: Amnesia, Host: i, For: ms})
	}
	r := Run(cfg)
	if r.Failure == nil {
		t.Fatal("all copies are lost and nobody noticed")
	}
	small := Minimize(r, 120)
	if small.Failure == nil || small.Failure.Promise != r.Failure.Promise || len(small.Faults) > 4 || small.Config.Steps >= r.Config.Steps {
		t.Fatalf("%d faults and %d operations are left: %+v", len(small.Faults), small.Config.Steps, small.Failure)
	}
	again := small.Config
	again.Faults = small.Faults
	if b := Run(again); b.Failure == nil || b.Hash != small.Hash {
		t.Fatalf("the smaller run does not fail alike: %+v", b.Failure)
	}
}
