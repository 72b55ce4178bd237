package sim

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// report prints what a failing run needs to be understood and replayed.
func report(t *testing.T, r *Result) {
	t.Helper()
	t.Errorf("seed %d (%s): %s at %v: %s", r.Config.Seed, r.Shape, r.Failure.Promise, r.Failure.At, r.Failure.Text)
}

func envInt(name string, other int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return other
}

func TestSeeds(t *testing.T) {
	first, n := envInt("CAIRN_SIM_SEED", 1), envInt("CAIRN_SIM_SEEDS", 20)
	start := time.Now()
	bad := 0
	for seed := first; seed < first+n; seed++ {
		r := Run(Config{Seed: uint64(seed), Trace: os.Getenv("CAIRN_SIM_TRACE") != ""})
		if os.Getenv("CAIRN_SIM_STATS") != "" {
			fmt.Printf("%d %s: %+v\n", seed, r.Shape, r.Stats)
		}
		if r.Failure != nil {
			report(t, r)
			if bad++; bad >= 8 {
				break
			}
		}
		if r.Config.Trace {
			if err := Print(os.Stderr, r.Trace); err != nil {
				t.Fatal(err)
			}
		}
	}
	fmt.Println(time.Since(start)/time.Duration(n), "per seed", bad, "bad")
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
