package placement

import (
	"cmp"
	"fmt"
	"slices"
)

// Step is what can be done for a VM that is not where its data is.
type Step string

// The steps. They are priced in bytes over the network, the only currency: what
// a step moves now, and what the VM's traffic costs until the horizon.
const (
	Stay       Step = "stay"        // pay for remote traffic
	MoveVM     Step = "move VM"     // its memory travels, once
	MoveData   Step = "move data"   // its chunks travel, once
	AddReplica Step = "add replica" // the hot chunks travel, and every write does, for ever
)

// Prices are a rebalancing's terms.
type Prices struct {
	HorizonMs  int64   // a step must pay off within it
	Hysteresis float64 // and save at least this part of what staying costs; 0 ≤ h < 1
	// MinBytes is what a step must save at all: no move for a trifle.
	MinBytes float64
}

// DefaultPrices: an hour to pay off, a fifth to save, 64 MiB at least.
var DefaultPrices = Prices{HorizonMs: 3600_000, Hysteresis: 0.2, MinBytes: 64 << 20}

// Case is one VM's situation.
type Case struct {
	VM      string
	Host    int // now
	Target  int // the best other host for it, -1: none fits
	Memory  float64
	Chunks  []ChunkHeat
	HeatMs  int64 // the time the heat was measured over: 1.44 × HalfLife for decayed counters
	CanMove bool  // its state can travel (live migration)
	// FreeBytes is the room on the stores of the VM's host.
	FreeBytes float64
}

// Priced is one step's price.
type Priced struct {
	Step   Step
	Host   int     // where the VM is afterwards
	Once   float64 // bytes moved now
	Remote float64 // bytes over the network until the horizon
	Chunks []int   // that travel
	Why    string  // "" when possible
}

// Total is the price.
func (p Priced) Total() float64 { return p.Once + p.Remote }

// remote is what a VM on a host sends and fetches over the network until the
// horizon: reads of chunks that are not there, and all but the local one of
// each write's copies.
func (c Case) remote(host int, p Prices, local func(i int) bool) (sum float64) {
	scale := float64(p.HorizonMs) / float64(max(c.HeatMs, 1))
	for i, ch := range c.Chunks {
		r, here := float64(len(ch.Hosts)), local != nil && local(i) || slices.Contains(ch.Hosts, host)
		if here {
			sum += ch.Write * max(r-1, 0) * scale
		} else {
			sum += (ch.Read + ch.Write*r) * scale
		}
	}
	return sum
}

// Price prices every step, the cheapest first; the impossible ones are last and
// say why.
func (c Case) Price(p Prices) []Priced {
	out := []Priced{{Step: Stay, Host: c.Host, Remote: c.remote(c.Host, p, nil)}}
	vm := Priced{Step: MoveVM, Host: c.Target, Once: c.Memory}
	switch {
	case c.Target < 0 || c.Target == c.Host:
		vm.Why, vm.Host = "no better host has room", c.Host
	case !c.CanMove:
		vm.Why = "it cannot be moved while it runs"
	default:
		vm.Remote = c.remote(c.Target, p, nil)
	}
	data, add := Priced{Step: MoveData, Host: c.Host}, Priced{Step: AddReplica, Host: c.Host}
	scale := float64(p.HorizonMs) / float64(max(c.HeatMs, 1))
	moved, added := map[int]bool{}, map[int]bool{}
	for i, ch := range c.Chunks {
		if slices.Contains(ch.Hosts, c.Host) {
			continue
		}
		if (ch.Read+ch.Write)*scale > float64(ch.Bytes) { // local, it saves its reads and one copy of each write
			data.Once += float64(ch.Bytes)
			data.Chunks, moved[i] = append(data.Chunks, i), true
		}
		if ch.Read*scale > float64(ch.Bytes) { // one more copy to write, here: it saves the reads alone
			add.Once += float64(ch.Bytes)
			add.Chunks, added[i] = append(add.Chunks, i), true
			add.Remote += ch.Write * scale // its other copies are as many as before
		}
	}
	for _, s := range []*Priced{&data, &add} {
		if len(s.Chunks) == 0 {
			s.Why = "no remote chunk is hot enough to be worth its bytes"
		} else if s.Once > c.FreeBytes {
			s.Why = fmt.Sprintf("it needs %s on the host's stores, %s are free", Bytes(uint64(s.Once)), Bytes(uint64(c.FreeBytes)))
		}
	}
	data.Remote = c.remote(c.Host, p, func(i int) bool { return moved[i] })
	add.Remote += c.remote(c.Host, p, func(i int) bool { return added[i] })
	out = append(out, vm, data, add)
	slices.SortStableFunc(out, func(a, b Priced) int {
		switch {
		case (a.Why == "") != (b.Why == ""):
			return b2i(a.Why != "") - b2i(b.Why != "")
		case a.Total() < b.Total():
			return -1
		case a.Total() > b.Total():
			return 1
		}
		return 0
	})
	return out
}

// Choose returns the step to take: the cheapest, if it saves enough. What it
// leaves behind is priced by the same rule, so a step is never undone by the
// next round without new traffic: going back would have to save as much again.
func (c Case) Choose(p Prices) Priced {
	steps := c.Price(p)
	stay := steps[slices.IndexFunc(steps, func(s Priced) bool { return s.Step == Stay })]
	if saved := stay.Total() - steps[0].Total(); saved < p.MinBytes || saved < p.Hysteresis*stay.Total() {
		return stay
	}
	return steps[0]
}

// Explain prints the prices, cheapest first, with the terms they were made on.
func (c Case) Explain(p Prices, hostName func(int) string) string {
	rows := [][]string{{"STEP", "HOST", "BYTES NOW", "BYTES OVER THE NETWORK", "PRICE", "VERDICT"}}
	chosen := c.Choose(p).Step
	for _, s := range c.Price(p) {
		verdict := s.Why
		if s.Step == chosen {
			verdict = "chosen"
		}
		price, remote := Bytes(uint64(s.Total())), Bytes(uint64(s.Remote))
		if s.Why != "" {
			price, remote = "-", "-"
		}
		rows = append(rows, []string{string(s.Step), hostName(s.Host), Bytes(uint64(s.Once)), remote, price, verdict})
	}
	return fmt.Sprintf("VM %s on %s; traffic counted for the next %d s; a step must save %.0f %% and %s\n",
		c.VM, hostName(c.Host), p.HorizonMs/1000, 100*p.Hysteresis, Bytes(uint64(p.MinBytes))) + Table(rows)
}

// Move is one VM's planned move.
type Move struct {
	VM       string
	From, To int
	Gain     float64 // more of its traffic local, 0 < Gain ≤ 1
}

// Budget bounds one round of rebalancing.
type Budget struct {
	Moves int               // VMs that may move, counting partners of swaps
	Min   float64           // least gain of a move, or of a swap together: the hysteresis
	Worth func([]Move) bool // prices moves that stand or fall together; nil: all are worth it
}

func (b Budget) worth(m ...Move) bool { return b.Worth == nil || b.Worth(m) }

// Rebalance plans moves that bring VMs to their data: a direct move where the
// better host has room, or a swap with a VM there that loses less than the
// first one gains. Greedy by gain; it changes the fleet as it plans, and every
// move passes the filters.
func Rebalance(f *Fleet, b Budget) (moves []Move) {
	type want struct {
		job    *Job
		at, to int
		gain   float64
	}
	var wants []want
	for i := range f.hosts {
		for _, j := range f.Jobs(i) {
			for to, g := range j.Gains {
				if d := g - j.Gains[i]; to != i && d >= b.Min {
					wants = append(wants, want{j, i, to, d})
				}
			}
		}
	}
	slices.SortFunc(wants, func(x, y want) int {
		switch {
		case x.gain > y.gain:
			return -1
		case x.gain < y.gain:
			return 1
		case x.job.Name != y.job.Name:
			return cmp.Compare(x.job.Name, y.job.Name)
		}
		return x.to - y.to
	})
	moved := map[string]bool{}
	for _, w := range wants {
		if moved[w.job.Name] || len(moves) >= b.Moves {
			continue
		}
		m := Move{w.job.Name, w.at, w.to, w.gain}
		if b.worth(m) && f.shift(w.job, w.at, w.to) {
			moves = append(moves, m)
			moved[w.job.Name] = true
			continue
		}
		if len(moves)+2 > b.Moves {
			continue
		}
		if m, ok := f.swap(m, w.job, b, moved); ok {
			moves = append(moves, m...)
			for _, x := range m {
				moved[x.VM] = true
			}
		}
	}
	return moves
}

// shift moves a job if it fits.
func (f *Fleet) shift(j *Job, from, to int) bool {
	if !f.hosts[to].passes(j) || f.Release(j.Name) != nil {
		return false
	}
	if f.Bind(j, to) == nil {
		return true
	}
	f.back(j, from)
	return false
}

// back undoes a release nobody else could have used: the planner owns the fleet.
func (f *Fleet) back(j *Job, at int) {
	if err := f.Bind(j, at); err != nil {
		panic("placement: a VM no longer fits where it was: " + err.Error())
	}
}

// swapPartners bounds how many partners a swap is tried with.
const swapPartners = 32

// swap sends j to a host and one VM from there elsewhere: to the host j leaves,
// or to any host with the partner's data that has room.
func (f *Fleet) swap(m Move, j *Job, b Budget, moved map[string]bool) ([]Move, bool) {
	from, to, gain, least := m.From, m.To, m.Gain, b.Min
	type partner struct {
		job  *Job
		dest int
		lose float64
	}
	var ps []partner
	for _, p := range f.Jobs(to) {
		if moved[p.Name] {
			continue
		}
		for dest, g := range p.Gains {
			if dest != to && dest != from && f.hosts[dest].passes(p) {
				ps = append(ps, partner{p, dest, p.Gains[to] - g})
			}
		}
		ps = append(ps, partner{p, from, p.Gains[to] - p.Gains[from]})
	}
	slices.SortFunc(ps, func(a, b partner) int {
		switch {
		case a.lose < b.lose:
			return -1
		case a.lose > b.lose:
			return 1
		case a.job.Name != b.job.Name:
			return cmp.Compare(a.job.Name, b.job.Name)
		}
		return a.dest - b.dest
	})
	for i, p := range ps {
		if i == swapPartners || gain-p.lose < least {
			break
		}
		other := Move{p.job.Name, to, p.dest, -p.lose}
		if !b.worth(m, other) {
			continue
		}
		if f.Release(p.job.Name) != nil || f.Release(j.Name) != nil {
			panic("placement: a bound VM cannot be released")
		}
		if f.Bind(j, to) == nil {
			if f.Bind(p.job, p.dest) == nil {
				return []Move{m, other}, true
			}
			if err := f.Release(j.Name); err != nil {
				panic("placement: " + err.Error())
			}
		}
		f.back(j, from)
		f.back(p.job, to)
	}
	return nil, false
}
