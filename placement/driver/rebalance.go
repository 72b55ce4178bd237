package driver

import (
	"fmt"
	"slices"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/placement"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
)

// Terms of plans.
const (
	defaultMovesMax = 16
	minGain         = 0.1     // of a VM's move
	defaultBytesMax = 1 << 30 // of chunks
	hotVMsMax       = 256     // whose data one plan looks at
	// Stores are evened out when one is unevenAbove × the mean or unevenBelow ×
	// it, and only if more than 1 in unevenPart of it, and unevenLeast bytes, are
	// in the wrong place: the hysteresis. A plan goes from above the mean to below it, so that none
	// undoes another.
	unevenAbove, unevenBelow = 1.10, 0.80
	unevenLeast              = 256 << 20
	unevenPart               = 100
)

// Steps of a plan beside placement's own.
const stepEven = "even"

// Terms of cooling, unless the policy says others.
const (
	defaultCoolMs      = 3600_000
	defaultCoolPercent = 70
)

// plan is one rebalancing: VMs to their data, hot chunks to their VMs, and, with
// what is left of the budget, of some volumes, used chunks to fast stores, idle ones
// to slow stores, and chunks from full stores to empty ones of the same class.
type plan struct {
	*scene
	noVMs  bool
	bytes  uint64              // left of the budget
	stores []server.StoreView  // used as planned so far
	at     map[ids.StoreID]int // index into stores
	some   []server.VolumeView // whose chunks are looked at
	chunks map[string]bool     // volume and index: moved in this plan
	ans    *pb.PlaceAnswer
	rows   [][]string
}

// rebalance plans inside a budget. Each step, or both VMs of a swap, must pay.
func (s *scene) rebalance(q *pb.PlaceQuestion) *pb.PlaceAnswer {
	p := &plan{scene: s, noVMs: q.NoVms, bytes: q.BytesMax, stores: slices.Clone(s.pic.Stores), at: map[ids.StoreID]int{},
		chunks: map[string]bool{}, ans: &pb.PlaceAnswer{}}
	if p.bytes == 0 {
		p.bytes = defaultBytesMax
	}
	for i, st := range p.stores {
		p.at[st.ID] = i
	}
	if !p.noVMs {
		p.moveVMs(int(q.MovesMax))
	}
	if len(p.stores) > 0 {
		p.moveData()
		p.others()
	}
	t := placement.DefaultPrices
	p.ans.Text = fmt.Sprintf("bytes over the network in the next %d s by the heat of now, a move's own included, and for cool and warm what slow stores read and write; a move, or both of a swap, must save %.0f %% and %s\n",
		t.HorizonMs/1000, 100*t.Hysteresis, placement.Bytes(uint64(t.MinBytes)))
	if len(p.ans.Moves) == 0 {
		p.ans.Text += "nothing is worth moving\n"
	} else {
		p.ans.Text += placement.Table(append([][]string{{"STEP", "WHAT", "FROM", "TO", "MORE LOCAL", "STAYING COSTS", "MOVING COSTS", "WHY"}}, p.rows...))
	}
	return p.ans
}

// running calls f for the VMs that run undisturbed and whose heat is known.
func (p *plan) running(f func(vm *pb.VM, host int)) {
	for _, vm := range p.pic.VMs {
		i, ok := p.fleet.Number(vm.Host)
		if ok && vm.Desired == "running" && vm.GetQueue().GetStep() == "" && (p.pic.Hot == nil || p.pic.Hot(vm)) {
			f(vm, i)
		}
	}
}

func (p *plan) moveVMs(movesMax int) {
	if movesMax <= 0 {
		movesMax = defaultMovesMax
	}
	hot := map[string]bool{}
	p.running(func(vm *pb.VM, _ int) { hot[vm.Name] = true })
	for i := range p.pic.Hosts {
		for _, j := range p.fleet.Jobs(i) {
			if hot[j.Name] { // a cold one pays for nothing
				p.gains(j)
			}
		}
	}
	for _, m := range placement.Rebalance(p.fleet, placement.Budget{Moves: movesMax, Min: minGain, Worth: p.worthMoving}) {
		stay, move := p.prices(m)
		p.add(&pb.PlaceMove{Step: string(placement.MoveVM), Vm: m.VM, From: p.pic.Hosts[m.From].Name, To: p.pic.Hosts[m.To].Name, Gain: m.Gain, StayBytes: stay, MoveBytes: move}, m.VM)
	}
}

// worthMoving says whether VMs' moves pay, and no VM's data would come cheaper.
func (p *plan) worthMoving(ms []placement.Move) bool {
	for _, m := range ms {
		if len(p.stores) > 0 && p.caseOf(p.vms[m.VM], m.From, m.To).Choose(placement.DefaultPrices).Step == placement.MoveData {
			return false
		}
	}
	return p.worth(ms)
}

func (p *plan) add(m *pb.PlaceMove, what string) {
	p.ans.Moves = append(p.ans.Moves, m)
	more, stay, move := "-", "-", "-"
	switch placement.Step(m.Step) {
	case placement.MoveVM, placement.MoveData:
		more = fmt.Sprintf("%+.0f %%", 100*m.Gain)
		fallthrough
	case placement.Warm, placement.Cool:
		stay, move = placement.Bytes(uint64(m.StayBytes)), placement.Bytes(uint64(m.MoveBytes))
	}
	p.rows = append(p.rows, []string{m.Step, what, m.From, m.To, more, stay, move, m.Chunk.GetWhy()})
}

// moveData brings hot chunks to VMs that stay where they are, if that is the
// cheapest. A further copy never is: a volume has one reader, its writer, and a
// copy more costs every write once more (TestAddingACopyIsNeverCheaper); how many
// there are is a matter of safety, and people's (`cairn volume set --replicas`).
func (p *plan) moveData() {
	moving := map[string]bool{}
	for _, m := range p.ans.Moves {
		moving[m.Vm] = true
	}
	left := hotVMsMax
	p.running(func(vm *pb.VM, host int) {
		if moving[vm.Name] || left == 0 || p.bytes == 0 {
			return
		}
		left--
		c := p.caseOf(vm, host, -1)
		best := c.Choose(placement.DefaultPrices)
		if best.Step != placement.MoveData {
			return
		}
		var stay placement.Priced
		for _, s := range c.Price(placement.DefaultPrices) {
			if s.Step == placement.Stay {
				stay = s
			}
		}
		views := p.pic.Chunks(vm)
		for _, i := range best.Chunks {
			more := placement.Gain([]placement.ChunkHeat{c.Chunks[i]})
			p.bring(vm, host, views[i], &pb.PlaceMove{Step: string(placement.MoveData), Vm: vm.Name, Gain: share(c.Chunks, i) * (1 - more[host]), StayBytes: stay.Total(), MoveBytes: best.Total()})
		}
	})
}

// share is a chunk's part of its VM's traffic.
func share(chunks []placement.ChunkHeat, i int) float64 {
	all := 0.0
	for _, c := range chunks {
		all += c.Read + c.Write
	}
	if all == 0 {
		return 0
	}
	return (chunks[i].Read + chunks[i].Write) / all
}

// bring plans one hot chunk's way to its VM's host, there to a fast store if it has
// any: the copy that goes is the one whose failure domain the new one would share,
// or else the one on the fullest store.
func (p *plan) bring(vm *pb.VM, host int, c server.ChunkView, m *pb.PlaceMove) {
	h := p.pic.Hosts[host]
	to, fast := -1, slices.ContainsFunc(p.stores, func(st server.StoreView) bool { return st.Host == h.Name && st.Up && !st.Slow })
	for i, st := range p.stores {
		if st.Host == h.Name && st.Up && st.Slow != fast && st.UsedBytes+c.Bytes <= st.CapacityBytes && (to < 0 || st.UsedBytes < p.stores[to].UsedBytes) {
			to = i
		}
	}
	if to < 0 || h.Drained || !c.Settled || p.bytes < c.Bytes || p.chunks[key(c)] {
		return
	}
	from, domain := -1, state.Label(h.Host, c.Domain)
	for _, id := range c.Stores {
		i, ok := p.at[id]
		if !ok {
			return // it is leaving: its writer moves it
		}
		if p.domain(i, c.Domain) == domain {
			from = i
			break
		}
		if from < 0 || fill(p.stores[i]) > fill(p.stores[from]) {
			from = i
		}
	}
	if from >= 0 {
		m.Chunk = &pb.ChunkWish{Why: fmt.Sprintf("VM %s there reads and writes it", vm.Name)}
		p.move(c, from, to, m)
	}
}

func (p *plan) domain(store int, label string) string {
	i, ok := p.fleet.Number(p.stores[store].Host)
	if !ok {
		return ""
	}
	return state.Label(p.pic.Hosts[i].Host, label)
}

func fill(s server.StoreView) float64 { return float64(s.UsedBytes) / float64(max(s.CapacityBytes, 1)) }

func key(c server.ChunkView) string { return fmt.Sprint(c.Volume, " ", c.Index) }

// move enters a chunk's move into the plan.
func (p *plan) move(c server.ChunkView, from, to int, m *pb.PlaceMove) {
	f, t := &p.stores[from], &p.stores[to]
	f.UsedBytes -= min(f.UsedBytes, c.Bytes)
	t.UsedBytes += c.Bytes
	p.bytes -= min(p.bytes, c.Bytes)
	p.chunks[key(c)] = true
	m.Volume, m.From, m.To = c.Name, f.Host, t.Host
	m.Chunk.Index, m.Chunk.From, m.Chunk.To = c.Index, f.ID[:], t.ID[:]
	p.add(m, fmt.Sprintf("chunk %d of volume %s", c.Index, m.Volume))
}

// others plans what is no VM's: stores' classes, and even stores, of some volumes.
func (p *plan) others() {
	uneven, classes := p.uneven(), slices.ContainsFunc(p.stores, func(s server.StoreView) bool { return s.Slow != p.stores[0].Slow })
	if p.pic.Sample == nil || !uneven && !classes {
		return
	}
	p.some = p.pic.Sample()
	var labels []string
	for _, v := range p.some {
		if !slices.Contains(labels, v.Domain) {
			labels = append(labels, v.Domain)
		}
	}
	for _, label := range labels {
		if classes {
			p.tiers(label)
		}
		if uneven {
			p.even(label)
		}
	}
}

// settled lists the chunks, of volumes with a failure-domain label, that may move,
// and how placement sees them. The copy on its reader's host is the one to keep.
func (p *plan) settled(label string) (views []server.ChunkView, chunks []placement.Kept) {
	for _, v := range p.some {
		for _, c := range v.Chunks {
			if v.Domain != label || !c.Settled || p.chunks[key(c)] {
				continue
			}
			k := placement.Kept{Placed: placement.Placed{Bytes: c.Bytes, Stores: c.Stores}, Heat: placement.Heat{Read: c.Read, Write: c.Write}, IdleMs: c.IdleMs}
			if i := slices.Index(c.Hosts, v.Home); i >= 0 {
				k.Keep = c.Stores[i]
			}
			views, chunks = append(views, c), append(chunks, k)
		}
	}
	return views, chunks
}

// seen translates the stores as planned so far.
func (p *plan) seen(label string) (stores []placement.Store) {
	for i, s := range p.stores {
		stores = append(stores, placement.Store{ID: s.ID, Host: s.Host, Domain: p.domain(i, label), Up: s.Up, CapacityBytes: s.CapacityBytes, UsedBytes: s.UsedBytes, Slow: s.Slow})
	}
	return stores
}

// tiers plans moves between fast and slow stores.
func (p *plan) tiers(label string) {
	t := placement.Tiers{Prices: placement.DefaultPrices, HeatMs: heatMs, CoolMs: p.pic.Policy.GetCoolMs(), Above: float64(p.pic.Policy.GetCoolPercent()) / 100}
	if t.CoolMs == 0 {
		t.CoolMs = defaultCoolMs
	}
	if t.Above == 0 {
		t.Above = defaultCoolPercent / 100.0
	}
	views, chunks := p.settled(label)
	for _, m := range placement.PlanTiers(p.seen(label), chunks, t, p.bytes) {
		p.move(views[m.Chunk], p.at[m.From], p.at[m.To], &pb.PlaceMove{Step: string(m.Step), StayBytes: m.Stay, MoveBytes: m.Price, Chunk: &pb.ChunkWish{Why: m.Why}})
	}
}

// even plans moves from stores above their class's mean to stores below it. The
// copy on its reader's host stays: else it would be brought back.
func (p *plan) even(label string) {
	views, chunks := p.settled(label)
	most := uint64(1)
	var placed []placement.Placed
	for _, c := range chunks {
		placed, most = append(placed, c.Placed), max(most, c.Bytes)
	}
	for _, mv := range placement.Even(p.seen(label), placed, 0, int(p.bytes/most)) {
		if c := views[mv.Chunk]; !p.chunks[key(c)] {
			p.move(c, p.at[mv.From], p.at[mv.To], &pb.PlaceMove{Step: stepEven, Chunk: &pb.ChunkWish{Why: "its store is fuller than the mean, the other one emptier"}})
		}
	}
}

// uneven says whether stores of a class are to be evened out.
func (p *plan) uneven() bool {
	used, capacity := map[bool]float64{}, map[bool]float64{}
	for _, s := range p.stores {
		used[s.Slow], capacity[s.Slow] = used[s.Slow]+float64(s.UsedBytes), capacity[s.Slow]+float64(s.CapacityBytes)
	}
	for _, s := range p.stores {
		mean := used[s.Slow] / max(capacity[s.Slow], 1)
		off := float64(s.UsedBytes) - mean*float64(s.CapacityBytes)
		least := max(unevenLeast, float64(s.CapacityBytes)/unevenPart)
		if s.Up && (fill(s) > unevenAbove*mean && off > least || fill(s) < unevenBelow*mean && off < -least) {
			return true
		}
	}
	return false
}

// prices are what staying and moving cost.
func (s *scene) prices(m placement.Move) (stay, move float64) {
	for _, p := range s.caseOf(s.vms[m.VM], m.From, m.To).Price(placement.DefaultPrices) {
		switch p.Step {
		case placement.Stay:
			stay = p.Total()
		case placement.MoveVM:
			move = p.Total()
		}
	}
	return stay, move
}

// worth prices moves that stand or fall together.
func (s *scene) worth(ms []placement.Move) bool {
	stay, move := 0.0, 0.0
	for _, m := range ms {
		a, b := s.prices(m)
		stay, move = stay+a, move+b
	}
	p := placement.DefaultPrices
	return stay-move >= p.MinBytes && stay-move >= p.Hysteresis*stay
}
