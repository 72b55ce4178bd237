// Package place replays traces of machines' lives over the production
// placement: the same fleet, scheduler, queue and rebalancing that a cluster
// runs, in virtual time.
//
// Duty: seeded synthetic traces and trace files, their replay, the policies
// they are compared with, and the tables and plots of it. Floor: F5. It makes
// no decision of its own but the naive ones it compares with.
//
//	trace    what happens: the synthetic traces, and their file format
//	replay   a trace over the production core
//	rivals   random, VMs without data, data that follows its VM
//	report   tables and plots
package place

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
)

// Sizes of the synthetic world. A host has as much memory for each processor
// as VMs ask for on average, so that neither is plentiful.
const (
	hostCPU     = 64_000    // thousandths
	hostMemory  = 288 << 30 // bytes: 4.5 GiB a processor
	hostsOfRack = 20
	replicas    = 3
	meanLifeMs  = 3600_000
)

// Host is a machine of a trace.
type Host struct {
	Name   string
	Rack   string
	CPU    uint64 // thousandths
	Memory uint64 // bytes
}

// Data is a part of a VM's data: a set of chunks with the same replicas.
type Data struct {
	Hosts []int   // with a replica
	Heat  float64 // bytes read a second
	Bytes uint64
}

// Event is one line of a trace.
type Event struct {
	AtMs int64
	Kind Kind

	// Arrive:
	VM     string
	CPU    uint64
	Memory uint64
	LifeMs int64 // how long it runs once placed; 0: until the end
	Tenant string
	Class  int
	Data   []Data

	// Fail, Return, Drain, Resume: hosts by number.
	Hosts []int
}

// Kind says what happens.
type Kind string

// The kinds of events.
const (
	Arrive    Kind = "vm"
	Fail      Kind = "fail"   // hosts and their data are lost
	Return    Kind = "return" // empty
	Drain     Kind = "drain"  // their VMs must go, their data is moved away
	Resume    Kind = "resume"
	Rebalance Kind = "rebalance"
)

// Trace is machines and what happens, in order of time.
type Trace struct {
	Name   string
	Seed   uint64
	Hosts  []Host
	Events []Event
}

// Names are the synthetic traces.
var Names = []string{"arrivals", "fill-0.50", "fill-0.90", "fill-0.95", "churn-0.70", "churn-0.90", "churn-0.95", "skew", "rack-loss", "drain"}

// Synthetic makes a trace by its name; the same arguments give the same trace.
func Synthetic(name string, hosts int, seed uint64) (*Trace, error) {
	g := &generator{rng: rand.New(rand.NewPCG(seed, uint64(hosts))), skew: 1}
	g.t = &Trace{Name: name, Seed: seed}
	for i := range hosts {
		g.t.Hosts = append(g.t.Hosts, Host{Name: fmt.Sprintf("host-%05d", i), Rack: fmt.Sprintf("rack-%03d", i/hostsOfRack), CPU: hostCPU, Memory: hostMemory})
	}
	switch name {
	case "arrivals":
		g.fill(1.1, 0)
	case "fill-0.50", "fill-0.90", "fill-0.95":
		var load float64
		if _, err := fmt.Sscanf(name, "fill-%g", &load); err != nil {
			return nil, err
		}
		g.fill(load, 0)
		g.at(1000, Event{Kind: Rebalance})
	case "churn-0.70":
		g.churn(0.70)
	case "churn-0.90":
		g.churn(0.90)
	case "churn-0.95":
		g.churn(0.95)
	case "skew":
		g.skew = 6
		g.churn(0.90)
		g.at(meanLifeMs, Event{Kind: Rebalance})
	case "rack-loss":
		g.fill(0.80, 0)
		lost := g.rack(0)
		g.at(1000, Event{Kind: Fail, Hosts: lost}, Event{Kind: Rebalance})
		g.at(2000, Event{Kind: Return, Hosts: lost}, Event{Kind: Rebalance})
	case "drain":
		g.fill(0.80, 0)
		n := max(1, hosts/100)
		for i := 0; i < min(hosts, 20*n); i += n {
			batch := make([]int, 0, n)
			for h := i; h < min(i+n, hosts); h++ {
				batch = append(batch, h)
			}
			g.at(int64(1000+i*10), Event{Kind: Drain, Hosts: batch})
			g.at(int64(1005+i*10), Event{Kind: Resume, Hosts: batch})
		}
		g.at(1_000_000, Event{Kind: Rebalance})
	default:
		return nil, fmt.Errorf("there is no trace %q: use one of %v, or the name of a file", name, Names)
	}
	slices.SortStableFunc(g.t.Events, func(a, b Event) int { return cmp.Compare(a.AtMs, b.AtMs) })
	return g.t, nil
}

// generator makes a trace.
type generator struct {
	t    *Trace
	rng  *rand.Rand
	vms  int
	skew float64 // exponent of how unequal VMs' heat is
}

func (g *generator) at(ms int64, es ...Event) {
	for _, e := range es {
		e.AtMs = ms
		g.t.Events = append(g.t.Events, e)
	}
}

func (g *generator) rack(n int) (out []int) {
	for i := range g.t.Hosts {
		if i/hostsOfRack == n {
			out = append(out, i)
		}
	}
	return out
}

// pick draws an index by weight.
func pick(rng *rand.Rand, weights ...float64) int {
	sum := 0.0
	for _, w := range weights {
		sum += w
	}
	x := rng.Float64() * sum
	for i, w := range weights {
		if x -= w; x < 0 {
			return i
		}
	}
	return len(weights) - 1
}

// vm draws a VM: most are small, a tenth has 8 processors; 2, 4 or 8 GiB for
// each; its data in one set of replicas, or, where the volume has grown, in two.
func (g *generator) vm() Event {
	g.vms++
	cpu := uint64(1000) << pick(g.rng, 0.4, 0.3, 0.2, 0.1)
	e := Event{Kind: Arrive, VM: fmt.Sprintf("vm-%06d", g.vms), CPU: cpu, Memory: cpu / 1000 * (2 << 30 << pick(g.rng, 0.25, 0.5, 0.25)),
		Tenant: fmt.Sprintf("tenant-%d", g.rng.IntN(4))}
	heat := math.Pow(g.rng.Float64(), g.skew) * 1e6 * float64(cpu)
	bytes := uint64(cpu/1000) * (10 << 30)
	if g.rng.Float64() < 0.8 {
		e.Data = []Data{{g.homes(), heat, bytes}}
	} else {
		part := 0.5 + g.rng.Float64()/2
		e.Data = []Data{{g.homes(), heat * part, bytes / 2}, {g.homes(), heat * (1 - part), bytes / 2}}
	}
	return e
}

// homes draws hosts for the replicas, each in a rack of its own where there are
// enough.
func (g *generator) homes() []int {
	var out []int
	for len(out) < min(replicas, len(g.t.Hosts)) {
		h := g.rng.IntN(len(g.t.Hosts))
		same := func(o int) bool {
			return o == h || o/hostsOfRack == h/hostsOfRack && len(g.t.Hosts) >= replicas*hostsOfRack
		}
		if !slices.ContainsFunc(out, same) {
			out = append(out, h)
		}
	}
	return out
}

// load is the share of the scarcer resource that this much asks for.
func (g *generator) load(cpu, memory uint64) float64 {
	n := float64(len(g.t.Hosts))
	return max(float64(cpu)/hostCPU/n, float64(memory)/hostMemory/n)
}

// fill lets VMs arrive at once until they ask for a load.
func (g *generator) fill(load float64, lifeMs float64) (cpu, memory uint64) {
	for {
		e := g.vm()
		if g.load(cpu+e.CPU, memory+e.Memory) > load {
			return cpu, memory
		}
		cpu, memory = cpu+e.CPU, memory+e.Memory
		if lifeMs > 0 {
			e.LifeMs = 1 + int64(g.rng.ExpFloat64()*lifeMs)
		}
		g.at(0, e)
	}
}

// churn fills up to a load and holds it there for one mean life, in which each
// VM that ends makes room for others: a VM comes when what is asked for allows.
func (g *generator) churn(load float64) {
	cpu, memory := g.fill(load, meanLifeMs)
	type end struct {
		at          int64
		cpu, memory uint64
	}
	var ends []end
	for _, e := range g.t.Events {
		ends = append(ends, end{e.LifeMs, e.CPU, e.Memory})
	}
	slices.SortFunc(ends, func(a, b end) int { return cmp.Compare(a.at, b.at) })
	next := g.vm()
	for i := 0; i < len(ends) && ends[i].at < meanLifeMs; i++ {
		cpu, memory = cpu-ends[i].cpu, memory-ends[i].memory
		for now := ends[i].at; g.load(cpu+next.CPU, memory+next.Memory) <= load; next = g.vm() {
			next.LifeMs = 1 + int64(g.rng.ExpFloat64()*meanLifeMs)
			cpu, memory = cpu+next.CPU, memory+next.Memory
			g.at(now, next)
			e := end{now + next.LifeMs, next.CPU, next.Memory}
			if e.at < meanLifeMs {
				at, _ := slices.BinarySearchFunc(ends, e, func(a, b end) int { return cmp.Compare(a.at, b.at) })
				ends = slices.Insert(ends, max(at, i+1), e)
			}
		}
	}
}
