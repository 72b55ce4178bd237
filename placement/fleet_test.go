package placement

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

// rack is a fleet of n hosts of 16 processors and 64 GiB.
func rack(t testing.TB, n int) *Fleet {
	t.Helper()
	f := NewFleet()
	for i := range n {
		if _, err := f.Add(Machine{Name: fmt.Sprintf("host-%03d", i), Up: true, Capacity: Amounts{CPU: 16000, Memory: 64 * gib}}); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func job(name string, cpus uint64) *Job {
	return &Job{Name: name, Need: Amounts{CPU: cpus * 1000, Memory: cpus * 4 * gib}}
}

// Four schedulers fill a fleet to the last processor at once: every VM that
// was refused truly had no room, and nothing is promised twice.
func TestSchedulersTogetherNeverOvercommit(t *testing.T) {
	f := rack(t, 50)
	var wg sync.WaitGroup
	var mu sync.Mutex
	placed := 0
	for w := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			s := NewScheduler(f, NearData, 10, uint64(w))
			for i := range 250 {
				if _, _, err := s.Place(job(fmt.Sprintf("vm-%d-%d", w, i), 1)); err == nil {
					mu.Lock()
					placed++
					mu.Unlock()
				}
			}
		}()
	}
	wg.Wait()
	if err := f.Check(); err != nil {
		t.Fatal(err)
	}
	if placed != 800 {
		t.Errorf("%d of 800 processors are given", placed)
	}
}

func TestApart(t *testing.T) {
	f := rack(t, 2)
	s := NewScheduler(f, NearData, 0, 1)
	a := job("a", 1)
	a.Group, a.Apart = "db", "db"
	b := *a
	b.Name = "b"
	c := *a
	c.Name = "c"
	first, _, err1 := s.Place(a)
	second, _, err2 := s.Place(&b)
	if err1 != nil || err2 != nil || first.Host == second.Host {
		t.Fatal(first, second, err1, err2)
	}
	if d, _, err := s.Place(&c); err == nil {
		t.Fatalf("the third of two apart hosts went to %d", d.Host)
	}
}

func TestQueueOrders(t *testing.T) {
	any := func(*Job) bool { return true }
	sjf := Queue{Order: SJF, AgeMs: 1000}
	long, short := job("long", 1), job("short", 1)
	long.DurationMs, short.DurationMs = 100, 10
	for _, j := range []*Job{long, short} {
		if err := sjf.Push(j, 0); err != nil {
			t.Fatal(err)
		}
	}
	if j, _ := sjf.Pop(1, false, any); j != short {
		t.Errorf("SJF took %s first", j.Name)
	}
	if err := sjf.Push(short, 999); err != nil {
		t.Fatal(err)
	}
	if j, wait := sjf.Pop(1000, false, any); j != long || wait != 1000 {
		t.Errorf("the aged VM did not go first: %s after %d ms", j.Name, wait)
	}
	rr := Queue{Order: RoundRobin, Weights: map[string]float64{"a": 3, "b": 1}}
	for i := range 400 {
		j := job(fmt.Sprint(i), 1)
		j.Tenant = []string{"a", "b"}[i%2]
		if err := rr.Push(j, 0); err != nil {
			t.Fatal(err)
		}
	}
	got := map[string]int{}
	for range 200 {
		j, _ := rr.Pop(0, false, any)
		got[j.Tenant]++
	}
	if got["a"] < 148 || got["a"] > 152 {
		t.Errorf("shares of weights 3 and 1 are %v", got)
	}
}

func TestPreemptionSparesEqualClasses(t *testing.T) {
	f := rack(t, 1)
	low, high := job("low", 8), job("high", 8)
	low.Class, high.Class = 1, 2
	if f.Bind(low, 0) != nil || f.Bind(high, 0) != nil {
		t.Fatal("the host is too small")
	}
	want := job("want", 8)
	want.Class = 2
	if e, ok := Preempt(f, want); !ok || !slices.Equal(e.Victims, []*Job{low}) {
		t.Errorf("evicts %v, %v", e, ok)
	}
	want.Class = 1
	if e, ok := Preempt(f, want); ok {
		t.Errorf("evicts an equal: %v", e)
	}
}

func TestSlicesShareEqually(t *testing.T) {
	var batch []*Job
	for i := range 5 {
		j := job(fmt.Sprint(i), 1)
		j.Batch = true
		batch = append(batch, j)
	}
	turns := map[string]int{}
	for turn := range int64(5) {
		run, pause := Slices(batch, 2000, 10, turn*10)
		if len(run) != 2 || len(pause) != 3 {
			t.Fatal(len(run), len(pause))
		}
		for _, j := range run {
			turns[j.Name]++
		}
	}
	for _, j := range batch {
		if turns[j.Name] != 2 {
			t.Errorf("turns %v, want 2 each", turns)
		}
	}
}

func TestPricesCanBeCheckedByHand(t *testing.T) {
	c := Case{VM: "v", Host: 0, Target: 1, Memory: gib, HeatMs: 1000, CanMove: true, FreeBytes: 10 * gib,
		Chunks: []ChunkHeat{{Heat: Heat{Read: 100 * mib}, Hosts: []int{1}, Bytes: 64 * mib}}}
	p := Prices{HorizonMs: 100_000, Hysteresis: 0.2, MinBytes: 64 * mib}
	s := c.Price(p)
	if s[0].Step != MoveData || s[0].Total() != 64*mib || c.Choose(p).Step != MoveData {
		t.Errorf("got %+v", s)
	}
	for _, x := range s {
		if x.Step == Stay && x.Total() != 10000*mib { // 100 MiB a second, 100 s
			t.Errorf("staying costs %f", x.Total())
		}
		if x.Step == MoveVM && x.Total() != gib {
			t.Errorf("moving the VM costs %f", x.Total())
		}
	}
	c.Chunks[0].Read = mib / 10 // 10 MiB until the horizon
	if got := c.Choose(p); got.Step != Stay {
		t.Errorf("a trifle moves: %+v", got)
	}
}

// All four steps for a VM whose one chunk, of two copies, is elsewhere, and that in
// the horizon reads 1000 MiB and writes 100: each wins where its price is least,
// but the copy more, which is dearer than the one that moves by what is written.
func TestTheCheapestOfFourStepsWins(t *testing.T) {
	p := Prices{HorizonMs: 100_000, Hysteresis: 0.2, MinBytes: 64 * mib}
	for _, c := range []struct {
		memory, heat float64 // heat: a part of the above
		want         Step
		prices       map[Step]float64 // MiB
	}{
		{1024, 1, MoveData, map[Step]float64{Stay: 1000 + 2*100, MoveVM: 1024 + 100, MoveData: 64 + 100, AddReplica: 64 + 100 + 100}},
		{16, 1, MoveVM, map[Step]float64{Stay: 1200, MoveVM: 16 + 100, MoveData: 164, AddReplica: 264}},
		{1024, 0.1, Stay, map[Step]float64{Stay: 120, MoveVM: 1024 + 10, MoveData: 64 + 10, AddReplica: 64 + 10 + 10}},
	} {
		v := Case{VM: "v", Host: 0, Target: 1, Memory: c.memory * mib, HeatMs: 1000, CanMove: true, FreeBytes: gib,
			Chunks: []ChunkHeat{{Heat: Heat{Read: 10 * mib * c.heat, Write: mib * c.heat}, Hosts: []int{1, 2}, Bytes: 64 * mib}}}
		for _, s := range v.Price(p) {
			if got := s.Total() / mib; s.Why != "" || got < c.prices[s.Step]-0.001 || got > c.prices[s.Step]+0.001 {
				t.Errorf("%s costs %.3f MiB, want %.0f (%s)", s.Step, got, c.prices[s.Step], s.Why)
			}
		}
		if got := v.Choose(p).Step; got != c.want {
			t.Errorf("at %+v: %s is chosen", c, got)
		}
	}
}

// Two VMs in each other's place on full hosts swap; a second round has nothing
// to do.
func TestRebalanceSwapsOnce(t *testing.T) {
	f := rack(t, 3)
	a, b := job("a", 16), job("b", 16)
	a.Gains, b.Gains = map[int]float64{1: 1}, map[int]float64{0: 1}
	spare := job("c", 16)
	if f.Bind(a, 0) != nil || f.Bind(b, 1) != nil || f.Bind(spare, 2) != nil {
		t.Fatal("the hosts are too small")
	}
	if m := Rebalance(f, Budget{Moves: 1, Min: 0.1}); len(m) != 0 {
		t.Errorf("a swap is two moves, the budget is one: %v", m)
	}
	if m := Rebalance(f, Budget{Moves: 10, Min: 0.1}); len(m) != 2 {
		t.Errorf("got %v", m)
	}
	if m := Rebalance(f, Budget{Moves: 10, Min: 0.1}); len(m) != 0 {
		t.Errorf("it moves again: %v", m)
	}
	if err := f.Check(); err != nil {
		t.Error(err)
	}
}

func TestNearStaysInItsDomain(t *testing.T) {
	f := NewFleet()
	for i, r := range []string{"r1", "r2", "r2"} {
		if _, err := f.Add(Machine{Name: fmt.Sprint(i), Up: true, Labels: map[string]string{"rack": r}, Capacity: Amounts{CPU: 2000, Memory: 64 * gib}}); err != nil {
			t.Fatal(err)
		}
	}
	s := NewScheduler(f, NearData, 0, 1)
	for i := range 5 {
		j := job(fmt.Sprint(i), 1)
		j.Group, j.Near, j.Domain = "g", "g", "rack"
		if i == 0 {
			j.Gains = map[int]float64{1: 1}
		}
		d, _, err := s.Place(j)
		if fits := i < 4; fits != (err == nil) || fits && d.Host == 0 {
			t.Errorf("VM %d went to %d: %v", i, d.Host, err)
		}
	}
}

func TestGainAndDecay(t *testing.T) {
	g := Gain([]ChunkHeat{{Heat: Heat{Read: 60}, Hosts: []int{1, 2}}, {Heat: Heat{Write: 80}, Hosts: []int{2, 3}}})
	if want := map[int]float64{1: 0.6, 2: 1, 3: 0.4}; fmt.Sprint(g) != fmt.Sprint(want) {
		t.Errorf("gains %v, want %v", g, want)
	}
	if h := (Heat{Read: 8, Write: 4}).Decay(2 * HalfLife); h != (Heat{2, 1}) {
		t.Errorf("after two half-lives %v", h)
	}
	if h := (Heat{Read: 8}).Decay(time.Duration(0)); h.Read != 8 {
		t.Errorf("after no time %v", h)
	}
}

// Same seed, same placements; and a full scan finds the one host with room.
func TestSampledDecisions(t *testing.T) {
	run := func() (out []int) {
		f := rack(t, 500)
		s := NewScheduler(f, NearData, SampleHosts, 7)
		for i := range 1000 {
			d, _, err := s.Place(job(fmt.Sprint(i), 8))
			if err != nil {
				t.Fatal(i, err) // 1,000 VMs fill it exactly
			}
			out = append(out, d.Host)
		}
		return out
	}
	if !slices.Equal(run(), run()) {
		t.Error("the same seed placed differently")
	}
}

func benchmarkDecide(b *testing.B, sample int) {
	f := rack(b, 10_000)
	s := NewScheduler(f, NearData, sample, 1)
	for i := range 20_000 {
		if _, _, err := s.Place(job(fmt.Sprint(i), 4)); err != nil {
			b.Fatal(err)
		}
	}
	j := job("next", 4)
	j.Gains = map[int]float64{17: 1, 4711: 0.7, 9000: 0.3}
	var took []time.Duration
	for b.Loop() {
		t0 := time.Now()
		s.Decide(j)
		took = append(took, time.Since(t0))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds()), "p99-ns")
}

func BenchmarkDecideSampled(b *testing.B) { benchmarkDecide(b, SampleHosts) }
func BenchmarkDecideFull(b *testing.B)    { benchmarkDecide(b, 0) }

func TestBytes(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 64 * mib: "64.0 MiB",
		gib - 1: "1.0 GiB", 1<<64 - 1: "16.0 EiB", 1536: "1.5 KiB"} {
		if got := Bytes(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}

// A sampled decision refuses exactly what a look at every host refuses.
func TestSampledRefusalsAreNoLuck(t *testing.T) {
	f := rack(t, 300)
	full, sampled := NewScheduler(f, NearData, 0, 1), NewScheduler(f, BestFit, 2, 2)
	for i := range 5000 {
		if _, _, err := sampled.Place(job(fmt.Sprint(i), uint64(1+i%7))); err != nil {
			break
		}
	}
	refused := 0
	for cpus := uint64(1); cpus <= 16; cpus++ {
		for mem := range uint64(16) {
			j := job("next", cpus)
			j.Need[Memory] = mem * 4 * gib
			a, b := full.Decide(j).Host, sampled.Decide(j).Host
			if (a < 0) != (b < 0) {
				t.Fatalf("%d processors, %d memory: a full look says %d, a sampled one %d", cpus, mem, a, b)
			}
			refused += b2i(a < 0)
		}
	}
	if refused == 0 || refused == 256 {
		t.Fatalf("%d of 256 refused: the fleet tells nothing", refused)
	}
}
