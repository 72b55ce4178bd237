package placement

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// servedVM is one VM of a queue's simulation.
type servedVM struct {
	tenant string
	waitMs int64
	cpuMs  float64
	// overtaken: an older one, past the ageing limit, waited on.
	overtaken bool
}

// run lets VMs of random sizes and durations come faster than a small fleet can
// serve them, and returns what became of each, in the order of their starts.
func run(t *testing.T, q *Queue, seed uint64, fromMs, untilMs int64) []servedVM {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	f := rack(t, 4) // 64 processors
	s := NewScheduler(f, BestFit, 0, seed)
	type end struct {
		at   int64
		name string
	}
	var ends []end
	var out []servedVM
	limit := q.AgeMs
	waiting := map[string]int64{}
	for now := int64(0); now < untilMs; now += 1000 {
		for len(ends) > 0 && ends[0].at <= now {
			if err := f.Release(ends[0].name); err != nil {
				t.Fatal(err)
			}
			ends = ends[1:]
		}
		for i := range rng.IntN(3) { // about one a second asks for 2.5 processors for 60 s: more than there is
			j := job(fmt.Sprintf("vm-%d-%d", now, i), uint64(1+rng.IntN(4)))
			j.DurationMs = 1000 + int64(rng.ExpFloat64()*30_000)
			j.Tenant = []string{"red", "blue", "green"}[rng.IntN(3)]
			if err := q.Push(j, now); err != nil {
				t.Fatal(err)
			}
			waiting[j.Name] = now
		}
		for {
			j, wait := q.Pop(now, false, func(j *Job) bool { d := s.Decide(j); return d.Host >= 0 && f.Bind(j, d.Host) == nil })
			if j == nil {
				break
			}
			since := waiting[j.Name]
			delete(waiting, j.Name)
			v := servedVM{tenant: j.Tenant, waitMs: wait, cpuMs: float64(j.Need[CPU])}
			for _, o := range waiting { // who is past the limit is overtaken by nobody younger
				v.overtaken = v.overtaken || limit > 0 && now-o >= limit && o < since
			}
			if now >= fromMs {
				out = append(out, v)
			}
			ends = append(ends, end{now + j.DurationMs, j.Name})
			slices.SortFunc(ends, func(a, b end) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.name, b.name)) })
		}
	}
	if err := f.Check(); err != nil {
		t.Fatal(err)
	}
	return out
}

func meanWait(vs []servedVM) float64 {
	sum := 0.0
	for _, v := range vs {
		sum += float64(v.waitMs)
	}
	return sum / float64(len(vs))
}

// Shortest first waits less on average than first come, first served, and
// nothing past the ageing limit is overtaken.
func TestSJFWaitsLess(t *testing.T) {
	for seed := range uint64(5) {
		sjf := run(t, &Queue{Order: SJF, AgeMs: 600_000}, seed, 0, 1_200_000)
		fifo := run(t, &Queue{Order: FIFO}, seed, 0, 1_200_000)
		if meanWait(sjf) > meanWait(fifo) {
			t.Errorf("seed %d: sjf waits %.0f ms on average, fifo %.0f", seed, meanWait(sjf), meanWait(fifo))
		}
		aged := 0
		for _, v := range sjf {
			if v.overtaken {
				t.Fatalf("seed %d: a VM past the ageing limit was overtaken", seed)
			}
			aged += b2i(v.waitMs >= 600_000)
		}
		t.Logf("seed %d: mean wait sjf %.0f ms, fifo %.0f ms; %d started past the ageing limit", seed, meanWait(sjf), meanWait(fifo), aged)
	}
}

// Tenants that always have something waiting get processors by their weights.
func TestRoundRobinShares(t *testing.T) {
	weights := map[string]float64{"red": 3, "blue": 2, "green": 1}
	for seed := range uint64(3) {
		q := &Queue{Order: RoundRobin, Weights: weights}
		for i := range 2400 { // so that no tenant runs dry
			j := job(fmt.Sprintf("old-%d", i), uint64(1+i%4))
			j.Tenant, j.DurationMs = []string{"red", "blue", "green"}[i%3], int64(10_000+i%7*5000)
			if err := q.Push(j, 0); err != nil {
				t.Fatal(err)
			}
		}
		got, all := map[string]float64{}, 0.0
		for _, v := range run(t, q, seed, 0, 300_000) {
			got[v.tenant] += v.cpuMs
			all += v.cpuMs
		}
		for n, w := range weights {
			share, want := got[n]/all, w/6
			if e := share/want - 1; e > 0.05 || e < -0.05 {
				t.Errorf("seed %d: %s has %.3f of the processors given, its weight says %.3f", seed, n, share, want)
			}
		}
	}
}

// However the classes lie, an eviction takes lower ones alone, few, and makes
// room.
func TestPreemptionProperties(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	found := 0
	for range 300 {
		f := rack(t, 3)
		for i := range 40 {
			j := job(fmt.Sprint(i), uint64(1+rng.IntN(6)))
			j.Class = rng.IntN(5)
			_ = f.Bind(j, rng.IntN(3)) // what does not fit is not there
		}
		want := job("want", uint64(1+rng.IntN(16)))
		want.Class = rng.IntN(6)
		e, ok := Preempt(f, want)
		if !ok {
			continue
		}
		found++
		if len(e.Victims) > PreemptMax {
			t.Fatalf("%d victims", len(e.Victims))
		}
		for _, v := range e.Victims {
			if v.Class >= want.Class {
				t.Fatalf("class %d evicts class %d", want.Class, v.Class)
			}
			if err := f.Release(v.Name); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Bind(want, e.Host); err != nil {
			t.Fatalf("after %d evictions it does not fit: %v", len(e.Victims), err)
		}
	}
	if found < 50 {
		t.Fatalf("only %d of 300 cases found room", found)
	}
}
