package place

import (
	"container/heap"
	"fmt"
	"slices"

	"github.com/cairnstore/cairn/placement"
)

// Config says how a trace is replayed.
type Config struct {
	Policy placement.Policy // of the production scheduler; or a Rival
	Rival  Rival            // "": none
	Sample int              // 0: every decision looks at all hosts
	Seed   uint64
	// Weights replaces the policy's scores, for experiments; nil: the policy's.
	Weights []placement.Weighted
}

// Result is what a replay came to.
type Result struct {
	Trace         string  `json:"trace"`
	Policy        string  `json:"policy"`
	Hosts         int     `json:"hosts"`
	Asked         int     `json:"asked"` // VMs
	Refused       int     `json:"refused"`
	FirstRefusal  float64 `json:"firstRefusal"`  // load at the first refusal; 1 when there was none
	Load          float64 `json:"load"`          // of what is bound, at the end
	HostsUsed     int     `json:"hostsUsed"`     // at the end of the arrivals, before any departure
	Bound         int     `json:"bound"`         // the least hosts that what was bound then needs
	Local         float64 `json:"local"`         // part of the traffic that is local, at the end
	Locality      float64 `json:"locality"`      // the same, of what would be with every VM on its best host
	LocalityFirst float64 `json:"localityFirst"` // Locality before the last rebalancing; −1 without one
	Moves         int     `json:"moves"`         // VMs moved by rebalancing
	Forced        int     `json:"forced"`        // VMs that had to move: host lost or drained
	Homeless      int     `json:"homeless"`      // of those, found no host
	Running       int     `json:"running"`       // at the end
	DataMoved     float64 `json:"dataMoved"`     // bytes, by the rival whose data follows
	Skew          float64 `json:"skew"`          // CPU use of the fullest host ÷ mean, at the end
	Placements    uint64  `json:"placements"`    // hash over every placement in order
}

// MovesPerVM is how many moves rebalancing took for each VM that runs.
func (r *Result) MovesPerVM() float64 { return float64(r.Moves) / float64(max(r.Running, 1)) }

// replay is one run.
type replay struct {
	cfg   Config
	t     *Trace
	fleet *placement.Fleet
	sched *placement.Scheduler
	rival *rival
	live  map[string]*vm
	ends  endHeap
	res   *Result

	cpu, memory       uint64 // bound
	capCPU, capMemory uint64
	grown             bool // a departure has happened: the arrivals are over
}

type vm struct {
	job  *placement.Job
	data []Data
	heat float64
}

type end struct {
	at   int64
	name string
}

type endHeap []end

func (h endHeap) Len() int { return len(h) }
func (h endHeap) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].name < h[j].name
}
func (h endHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *endHeap) Push(x any)   { *h = append(*h, x.(end)) }
func (h *endHeap) Pop() any {
	old := *h
	x := old[len(old)-1]
	*h = old[:len(old)-1]
	return x
}

// Replay runs a trace over the production placement.
func Replay(t *Trace, cfg Config) (*Result, error) {
	r, err := newReplay(t, cfg)
	if err != nil {
		return nil, err
	}
	for i := range t.Events {
		e := &t.Events[i]
		if err := r.until(e.AtMs); err != nil {
			return nil, err
		}
		if err := r.event(e); err != nil {
			return nil, err
		}
	}
	r.finish()
	return r.res, r.fleet.Check()
}

func newReplay(t *Trace, cfg Config) (*replay, error) {
	r := &replay{cfg: cfg, t: t, fleet: placement.NewFleet(), live: map[string]*vm{},
		res: &Result{Trace: t.Name, Policy: string(cfg.Policy), Hosts: len(t.Hosts), FirstRefusal: 1, LocalityFirst: -1, Placements: 14695981039346656037}}
	for _, h := range t.Hosts {
		r.capCPU, r.capMemory = r.capCPU+h.CPU, r.capMemory+h.Memory
		if _, err := r.fleet.Add(placement.Machine{Name: h.Name, Up: true, Labels: map[string]string{"rack": h.Rack},
			Capacity: placement.Amounts{placement.CPU: h.CPU, placement.Memory: h.Memory}}); err != nil {
			return nil, err
		}
	}
	r.sched = placement.NewScheduler(r.fleet, cfg.Policy, cfg.Sample, cfg.Seed)
	if cfg.Weights != nil {
		r.sched.Weights = cfg.Weights
	}
	if cfg.Rival != "" {
		r.res.Policy = string(cfg.Rival)
		r.rival = newRival(cfg.Rival, r)
	}
	return r, nil
}

// until ends the VMs whose life is over.
func (r *replay) until(ms int64) error {
	for len(r.ends) > 0 && r.ends[0].at <= ms {
		if !r.grown {
			r.measureHosts()
		}
		if err := r.drop(heap.Pop(&r.ends).(end).name); err != nil {
			return err
		}
	}
	return nil
}

func (r *replay) drop(name string) error {
	v := r.live[name]
	if v == nil {
		return nil
	}
	r.cpu, r.memory = r.cpu-v.job.Need[placement.CPU], r.memory-v.job.Need[placement.Memory]
	delete(r.live, name)
	return r.fleet.Release(name)
}

func (r *replay) load() float64 {
	return max(float64(r.cpu)/float64(r.capCPU), float64(r.memory)/float64(r.capMemory))
}

func (r *replay) event(e *Event) error {
	if e.Kind != Arrive && !r.grown {
		r.measureHosts()
	}
	switch e.Kind {
	case Arrive:
		r.arrive(e)
	case Fail:
		r.mark(e.Hosts, func(h int) { r.fleet.SetUp(h, false) })
		return r.leave(e.Hosts)
	case Return:
		r.mark(e.Hosts, func(h int) { r.fleet.SetUp(h, true) })
	case Drain:
		r.mark(e.Hosts, func(h int) { r.fleet.SetDrained(h, true) })
		return r.leave(e.Hosts)
	case Resume:
		r.mark(e.Hosts, func(h int) { r.fleet.SetDrained(h, false) })
	case Rebalance:
		r.rebalance()
	}
	return nil
}

func (r *replay) mark(hosts []int, f func(int)) {
	for _, h := range hosts {
		f(h)
	}
}

func (r *replay) arrive(e *Event) {
	r.res.Asked++
	v := newVM(e)
	if !r.place(v) {
		if r.res.Refused == 0 {
			r.res.FirstRefusal = r.load()
		}
		r.res.Refused++
		return
	}
	r.live[e.VM] = v
	r.cpu, r.memory = r.cpu+e.CPU, r.memory+e.Memory
	if e.LifeMs > 0 {
		heap.Push(&r.ends, end{e.AtMs + e.LifeMs, e.VM})
	}
}

func newVM(e *Event) *vm {
	v := &vm{data: slices.Clone(e.Data), job: &placement.Job{Name: e.VM, Tenant: e.Tenant, Class: e.Class, DurationMs: e.LifeMs,
		Need: placement.Amounts{placement.CPU: e.CPU, placement.Memory: e.Memory}}}
	for _, d := range v.data {
		v.heat += d.Heat
	}
	v.gains()
	return v
}

// Job is what a VM that arrives asks for, with its gains.
func (e *Event) Job() *placement.Job { return newVM(e).job }

// gains are the production's, of the VM's data as it is now.
func (v *vm) gains() {
	chunks := make([]placement.ChunkHeat, 0, len(v.data))
	for _, d := range v.data {
		chunks = append(chunks, placement.ChunkHeat{Heat: placement.Heat{Read: d.Heat}, Hosts: d.Hosts, Bytes: d.Bytes})
	}
	v.job.Gains = placement.Gain(chunks)
}

func (r *replay) place(v *vm) bool {
	host := -1
	if r.rival != nil {
		host = r.rival.place(v)
	} else if d, _, err := r.sched.Place(v.job); err == nil {
		host = d.Host
	}
	r.res.Placements = (r.res.Placements ^ uint64(host+1)) * 1099511628211
	return host >= 0
}

// leave empties hosts: their VMs are placed anew, and a replica that was there
// is made again on another host, as a rebuild would.
func (r *replay) leave(hosts []int) error {
	gone := map[int]bool{}
	for _, h := range hosts {
		gone[h] = true
	}
	for _, name := range r.names() {
		v := r.live[name]
		hit := false
		for i, d := range v.data {
			if !slices.ContainsFunc(d.Hosts, func(h int) bool { return gone[h] }) {
				continue
			}
			hit = true
			v.data[i].Hosts = r.rebuild(d.Hosts, gone, name)
		}
		if hit {
			v.gains()
		}
	}
	for _, h := range hosts {
		for _, j := range r.fleet.Jobs(h) {
			v := r.live[j.Name]
			r.res.Forced++
			if err := r.fleet.Release(j.Name); err != nil {
				return err
			}
			if !r.place(v) {
				r.res.Homeless++
				delete(r.live, j.Name)
				r.cpu, r.memory = r.cpu-j.Need[placement.CPU], r.memory-j.Need[placement.Memory]
			}
		}
	}
	return nil
}

func (r *replay) names() []string {
	out := make([]string, 0, len(r.live))
	for n := range r.live {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// rebuild replaces the replicas that are gone by ones on hosts that were drawn
// by the VM's name.
func (r *replay) rebuild(hosts []int, gone map[int]bool, name string) []int {
	out := slices.DeleteFunc(slices.Clone(hosts), func(h int) bool { return gone[h] })
	x := uint64(len(name))
	for _, b := range []byte(name) {
		x = (x ^ uint64(b)) * 1099511628211
	}
	for len(out) < len(hosts) {
		x = (x ^ x>>29) * 0xbf58476d1ce4e5b9
		h := int((x >> 33) % uint64(len(r.t.Hosts)))
		if m := r.fleet.Machine(h); m.Up && !m.Drained && !slices.Contains(out, h) {
			out = append(out, h)
		}
	}
	return out
}

// rebalanceMin is the least gain of a move, as in production.
const rebalanceMin = 0.1

// rebalanceRounds bounds how often a rebalancing begins anew: a move makes room
// for others.
const rebalanceRounds = 4

func (r *replay) rebalance() {
	if r.rival != nil {
		return
	}
	_, r.res.LocalityFirst = r.locality()
	for range rebalanceRounds {
		moves := placement.Rebalance(r.fleet, placement.Budget{Moves: len(r.live)/10 - r.res.Moves, Min: rebalanceMin})
		if r.res.Moves += len(moves); len(moves) == 0 {
			break
		}
	}
}

// locality is the part of the running VMs' traffic that is local now, and that
// part of what it would be with every VM on the best host for it: the rest is
// data in several places, which no move of a VM brings together.
func (r *replay) locality() (local, ofBest float64) {
	now, all, best := 0.0, 0.0, 0.0
	for _, name := range r.names() { // in order: sums of floats depend on it
		v := r.live[name]
		if i, ok := r.fleet.Where(name); ok {
			all += v.heat
			now += v.heat * v.job.Gains[i]
			best += v.heat * v.job.BestGain()
		}
	}
	if best == 0 {
		return 1, 1
	}
	return now / all, now / best
}

// measureHosts counts hosts in use and the least that could do.
func (r *replay) measureHosts() {
	r.grown = true
	for i := range r.t.Hosts {
		if r.fleet.Used(i) != (placement.Amounts{}) {
			r.res.HostsUsed++
		}
	}
	r.res.Bound = LowerBound(r.cpu, r.memory, r.t.Hosts[0])
}

// LowerBound is max(ΣCPU ÷ C, ΣMEM ÷ M), rounded up: no packing needs fewer
// hosts of this size.
func LowerBound(cpu, memory uint64, h Host) int {
	up := func(a, b uint64) int { return int((a + b - 1) / b) }
	return max(up(cpu, h.CPU), up(memory, h.Memory))
}

func (r *replay) finish() {
	if !r.grown {
		r.measureHosts()
	}
	r.res.Load, r.res.Running = r.load(), len(r.live)
	r.res.Local, r.res.Locality = r.locality()
	top := 0.0
	for i := range r.t.Hosts {
		top = max(top, float64(r.fleet.Used(i)[placement.CPU]))
	}
	r.res.Skew = top / (float64(max(r.cpu, 1)) / float64(len(r.t.Hosts)))
}

func (r *Result) String() string {
	first := "-"
	if r.LocalityFirst >= 0 {
		first = fmt.Sprintf("%.2f", 100*r.LocalityFirst)
	}
	return fmt.Sprintf("%-10s %6d %-16s asked %7d refused %6d first %.3f load %.3f used %6d bound %6d (%.3f) local %6.2f before %6s moves %6d (%.3f) forced %d homeless %d skew %.2f moved %.0f GiB",
		r.Trace, r.Hosts, r.Policy, r.Asked, r.Refused, r.FirstRefusal, r.Load, r.HostsUsed, r.Bound, float64(r.HostsUsed)/float64(r.Bound), 100*r.Locality, first, r.Moves, r.MovesPerVM(), r.Forced, r.Homeless, r.Skew, r.DataMoved/(1<<30))
}
