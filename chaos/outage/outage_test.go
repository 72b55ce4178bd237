package outage

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"github.com/cairnstore/cairn/chaos/check"
)

func TestMain(m *testing.M) {
	done, code, err := Isolate()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if done {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// Every kind of outage but the long ones, a few times each: no error, no broken
// promise, and a figure for every round. The figures themselves are
// `cairn bench outage`'s.
func TestOutages(t *testing.T) {
	bin := os.Getenv("CAIRN_BIN")
	if bin == "" {
		t.Fatal("CAIRN_BIN names no cairn binary: run by `make test-int`")
	}
	for name, rounds := range map[string]int{"kill": 3, "kill-leader": 2, "stop": 1, "cut": 1, "kill-all": 2, "power": 1, "dead-gateway": 3, "rebuild": 1} {
		t.Run(name, func(t *testing.T) {
			var out, talk bytes.Buffer
			err := Run(t.Context(), Config{Bin: bin, Out: &out, Talk: &talk, Only: []string{name}, Rounds: rounds})
			t.Logf("%s%s", &talk, &out)
			if err != nil {
				t.Fatal(err)
			}
			if got := bytes.Count(talk.Bytes(), []byte("\n")); got != rounds {
				t.Errorf("%d figures of %d rounds", got, rounds)
			}
			if name == "dead-gateway" && !bytes.Contains(out.Bytes(), []byte(" met ")) {
				t.Error("blocks changed between two reads")
			}
		})
	}
}

func TestUnknownOutage(t *testing.T) {
	if _, err := choose([]string{"kill", "flood"}); err == nil {
		t.Error("an unknown outage was accepted")
	}
}

func TestQuantile(t *testing.T) {
	v := []float64{5, 1, 4, 2, 3}
	for q, want := range map[float64]float64{0: 1, 0.5: 3, 0.8: 4, 0.95: 5, 1: 5} {
		if got := quantile(v, q); got != want {
			t.Errorf("quantile %g: %g, not %g", q, got, want)
		}
	}
}

// What the judge of the frozen gateway must see, and what it must let pass.
func TestLateAnswers(t *testing.T) {
	value := func(client, n uint64) check.Value { return check.Value(client<<check.ValueClientShift | n) }
	a, b := value(1, 1), value(successors+1, 1)
	read := func(client int, at int64, v check.Value) check.Op {
		return check.Op{Client: client, Kind: check.Read, Block: 7, Value: v, InvokeNs: at, ReturnNs: at + 1}
	}
	write := func(client int, at int64, v check.Value) check.Op {
		op := read(client, at, v)
		op.Kind = check.Write
		return op
	}
	cut := write(1, 50, a)
	cut.Unknown = true
	for _, c := range []struct {
		name string
		ops  []check.Op
		want int
	}{
		{"the old write took effect before the takeover", []check.Op{cut, read(successors, 110, a), write(successors, 120, b), read(successors, 130, b)}, 0},
		{"it took none", []check.Op{cut, read(successors, 110, 0), read(successors, 120, 0)}, 0},
		{"it was applied after the first read", []check.Op{cut, read(successors, 110, 0), read(successors, 120, a)}, 1},
		{"it was applied over a newer write", []check.Op{cut, write(successors, 110, b), read(successors, 120, a)}, 1},
		{"the old gateway answered a later read", []check.Op{read(1, 150, 0)}, 1},
		{"the old gateway answered before the takeover", []check.Op{read(1, 90, 0)}, 0},
	} {
		if got := lateAnswers(c.ops, 100); got != c.want {
			t.Errorf("%s: %d late answers, not %d", c.name, got, c.want)
		}
	}
}
