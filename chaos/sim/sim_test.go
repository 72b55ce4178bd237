package sim

import (
	"fmt"
	"os"
	"strconv"
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
