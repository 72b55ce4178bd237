package fault

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cairnstore/cairn/proto/status"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var names = map[string][]string{KindHost: {"host-2", "host-1", "host-3"}, KindMeta: {"meta-1", "meta-2", "meta-3"}}

func scheduler(t testing.TB, text string, seed uint64) *Scheduler {
	t.Helper()
	script, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewScheduler(script, seed, names)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A minute of the usual storm, as text: what a seed means must not change
// unnoticed, or old failures cannot be replayed.
func TestGoldenStorm(t *testing.T) {
	s := scheduler(t, `
		every 3s..6s kill host
		every 8s..15s kill meta leader
		every 10s..20s pause host 200ms..1s
		every 15s..20s hold host 3s..5s
		at 30s hold meta-2 10s
		keep 2 host
		keep 2 meta
	`, 7)
	var b strings.Builder
	for _, a := range s.Next(time.Minute) {
		fmt.Fprintln(&b, a)
	}
	file := filepath.Join("testdata", "storm.golden")
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("seed 7 now means (-update accepts it)\n%s\nnot\n%s", b.String(), want)
	}
}

func TestRulesAboutNobodyAreRefused(t *testing.T) {
	for _, text := range []string{"at 1s kill host-4", "at 1s kill disk", "at 1s kill leader"} {
		script, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := NewScheduler(script, 1, names); !errors.Is(err, status.Invalid) {
			t.Errorf("%q: got %v", text, err)
		}
	}
	script, err := Parse("at 1s kill meta leader")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewScheduler(script, 1, map[string][]string{KindHost: {"host-1"}}); !errors.Is(err, status.Invalid) {
		t.Errorf("no meta at all: got %v", err)
	}
}

func TestSeedsDiffer(t *testing.T) {
	const text = "every 1s..9s kill host"
	a, b := scheduler(t, text, 1).Next(time.Minute), scheduler(t, text, 2).Next(time.Minute)
	if reflect.DeepEqual(a, b) || len(a) == 0 {
		t.Fatalf("seeds 1 and 2 both give %v", a)
	}
}

func TestAnEndedScheduleIsNeverDue(t *testing.T) {
	s := scheduler(t, "at 1s kill host\nat 2s hold host-1 3s", 1)
	if got := s.Next(time.Hour); len(got) != 3 || got[2].Do != release || got[2].At != 5*time.Second {
		t.Fatalf("got %v", got)
	}
	if due, any := s.Due(); any {
		t.Fatalf("due again at %v", due)
	}
}

// Polling in any steps gives the same actions, in order of time, each at a
// time its rule allows; Due is never later than an action.
func TestPollingDoesNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		script, seed := drawScript(t), rapid.Uint64().Draw(t, "seed")
		whole, err := NewScheduler(script, seed, names)
		if err != nil {
			t.Fatal(err)
		}
		steps, err := NewScheduler(script, seed, names)
		if err != nil {
			t.Fatal(err)
		}
		const end = time.Minute
		want := whole.Next(end)
		var got []Action
		for now := time.Duration(0); now < end; {
			now = min(end, now+time.Duration(rapid.Int64Range(1, int64(20*time.Second)).Draw(t, "step")))
			due, any := steps.Due()
			as := steps.Next(now)
			if len(as) > 0 && (!any || due > as[0].At) {
				t.Fatalf("due at %v (%v) but got %v", due, any, as[0])
			}
			got = append(got, as...)
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("in steps %v\nat once %v", got, want)
		}
		for i := 1; i < len(want); i++ {
			if want[i].At < want[i-1].At {
				t.Fatalf("%v comes after %v", want[i], want[i-1])
			}
		}
	})
}

// No drawn fault leaves fewer up than Keep says, counted from the actions.
func TestKeepIsKept(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		script := drawScript(t)
		for i := range script.Rules { // named ones are outside Keep
			script.Rules[i].Target = rapid.SampledFrom([]string{"host", "meta", leader}).Draw(t, "drawn")
		}
		s, err := NewScheduler(script, rapid.Uint64().Draw(t, "seed"), names)
		if err != nil {
			t.Fatal(err)
		}
		down := map[string][]time.Duration{}
		for _, a := range s.Next(time.Minute) {
			if a.Do == release {
				continue
			}
			kind := KindHost
			if strings.HasPrefix(a.Target, KindMeta) {
				kind = KindMeta
			}
			n := 1
			for _, until := range down[kind] {
				if until > a.At {
					n++
				}
			}
			down[kind] = append(down[kind], a.At+max(a.For, killOut))
			if keep, ok := script.Keep[kind]; ok && 3-n < keep {
				t.Fatalf("%v is number %d down, keep %d of 3", a, n, keep)
			}
		}
	})
}

// The printed actions, read as a script, give the same actions under any seed.
func TestPrintedActionsReplay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, err := NewScheduler(drawScript(t), rapid.Uint64().Draw(t, "seed"), names)
		if err != nil {
			t.Fatal(err)
		}
		want := s.Next(time.Minute)
		var b strings.Builder
		for _, a := range want {
			fmt.Fprintln(&b, Done{Action: a})
		}
		script, err := Parse(b.String())
		if err != nil {
			t.Fatal(err)
		}
		replay, err := NewScheduler(script, 99, names)
		if err != nil {
			t.Fatal(err)
		}
		var got []Action
		for _, a := range replay.Next(time.Hour) {
			if a.Do != release || a.At <= time.Minute {
				got = append(got, a)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("replayed %v\nwanted %v", got, want)
		}
	})
}
