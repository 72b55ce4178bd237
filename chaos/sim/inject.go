package sim

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
)

// injector does the planned faults and undoes them.
type injector struct {
	w        *world
	plan     []Fault
	next     int
	healed   bool
	over     bool // and everything has converged
	everFull bool
	// failedUntil is when the last store whose disk failed was started again.
	failedUntil time.Duration
	echoUntil   time.Duration
	armed       []Fault   // wait for a flush
	running     []running // faults not over, for the pairs that met
	outUntil    time.Duration
}

// beyondLease is longer than a read lease: what lasts so long shows reads
// without one.
const beyondLease = 9 * time.Second

type running struct {
	kind  Kind
	until time.Duration
}

func newWorld(cfg Config) *world {
	w := &world{cfg: cfg, rng: rand.New(rand.NewPCG(cfg.Seed, 1)), hash: 0xcbf29ce484222325}
	draw := rand.New(rand.NewPCG(cfg.Seed, 2))
	w.shape = drawShape(draw)
	if cfg.shape != nil {
		w.shape = *cfg.shape
	}
	w.stats.Faults, w.stats.Pairs = map[Kind]int{}, map[[2]Kind]int{}
	if cfg.Trace {
		w.traces = []Line{}
	}
	w.faults = &injector{w: w, plan: cfg.Faults}
	if cfg.Faults == nil {
		w.faults.plan = drawFaults(draw, w.shape, cfg.Steps)
	}
	w.check = newChecker(w)
	w.meta = newMeta(w)
	for i := range w.shape.hosts {
		w.nodes = append(w.nodes, newNode(w, i))
	}
	for i := range w.shape.hosts {
		w.gates = append(w.gates, newGateway(w, i, w.shape.local))
	}
	w.load = newLoad(w)
	return w
}

func (w *world) nodeOf(id ids.StoreID) *node {
	for _, n := range w.nodes {
		if n.id == id {
			return n
		}
	}
	return nil
}

// begun does the faults that are due with operation n.
func (in *injector) begun(n int) {
	for !in.healed && in.next < len(in.plan) && in.plan[in.next].At <= n {
		f := in.plan[in.next]
		in.next++
		if !in.w.cfg.unfair && !in.fair(f) {
			continue
		}
		in.count(f)
		in.w.note("fault", string(f.Kind), f.String, uint64(f.Host), uint64(f.For))
		in.do(f)
	}
}

func (in *injector) count(f Fault) {
	w := in.w
	w.stats.Faults[f.Kind]++
	live := in.running[:0]
	for _, r := range in.running {
		if r.until > w.now {
			live = append(live, r)
			w.stats.Pairs[[2]Kind{r.kind, f.Kind}]++
		}
	}
	in.running = append(live, running{f.Kind, w.now + f.For})
	if in.w.shape.takesOut(f.Kind) {
		in.outUntil = max(in.outUntil, w.now+f.For)
	}
}

// quiet reports whether every store is up, answers and is in sync.
func (in *injector) quiet() bool {
	w := in.w
	if w.now < in.outUntil || w.meta.leader == nil {
		return false
	}
	for _, n := range w.nodes {
		m := w.meta.member(n)
		if !n.up() || n.pausedUntil > w.now || n.disk.hungUntil > w.now || n.store.Usage().State != "ok" || n.lostAt != 0 || n.gone || m != nil && !m.InSync {
			return false
		}
	}
	return w.boss.serving() != nil
}

// fair is the atlas's judgement, given how things stand.
func (in *injector) fair(f Fault) bool {
	switch {
	case f.Host >= len(in.w.nodes) || f.Gate >= len(in.w.gates):
		return false
	case f.Kind == PowerFlush || f.Kind == Survivor:
		return !in.w.shape.rot && (f.Kind == PowerFlush || in.w.shape.replicas > 1 && len(in.w.clones) == 0)
	case f.Kind == Amnesia:
		return in.w.shape.replicas > 1 && in.quiet() && len(in.w.livingClones()) == 0
	case isRot(f.Kind):
		return in.w.shape.rot
	case in.w.shape.takesOut(f.Kind) && slices.ContainsFunc(in.w.nodes, func(n *node) bool { return n.gone }):
		return false
	case f.Kind == Copies:
		return in.copies(f) > 0
	case f.Kind == Clone:
		s := in.chosen(f)
		return s != nil && s.seen == len(s.shows) && !in.w.shape.rot && len(in.w.livingClones()) < maxClones
	case f.Kind == Use || f.Kind == Drop:
		return in.clone(f) != nil
	case f.Kind == Look || f.Kind == Remove || f.Kind == RollBack:
		return in.chosen(f) != nil
	case f.Kind == Drain:
		return in.places()-1 >= slices.Max(append(in.w.boss.wanted, int(in.w.meta.volume().GetReplicas())))
	case in.w.shape.rot && (f.Kind == PowerAll || f.Kind == KillAll):
		return false
	case in.w.shape.rot && in.w.shape.takesOut(f.Kind):
		return in.quiet()
	}
	return true
}

// rotten reports whether a node's disk may hold damage.
func (in *injector) rotten(n *node) bool { return in.w.shape.rot && n.index == in.w.shape.victim }

// mayPoison reports whether a block without a good copy is thinkable.
func (in *injector) mayPoison() bool { return in.w.shape.rot }

// echo reports whether a request to metadata arrives twice.
func (in *injector) echo() bool { return in.echoUntil > in.w.now && in.w.chance(2) }

// heal ends all faults that do not end by themselves, also those that wait for
// something to happen.
func (in *injector) heal() {
	in.healed = true
	for _, n := range in.w.nodes {
		n.disk.failNext = false
	}
}

func (in *injector) do(f Fault) {
	w := in.w
	n, g := w.nodes[f.Host], w.gates[f.Gate]
	end := w.now + f.For
	p := g.paths[f.Host]
	switch f.Kind {
	case Reset:
		in.reset(g, n)
	case Partition:
		p.toServer, p.toClient = max(p.toServer, end), max(p.toClient, end)
	case MuteStore:
		p.toClient = max(p.toClient, end)
	case DeafStore:
		p.toServer = max(p.toServer, end)
	case SlowNet:
		slow := time.Duration(1+f.Arg%40) * time.Millisecond
		p.slow += slow
		w.after(f.For, func() { p.slow -= slow })
	case PauseStore, PauseGate, SlowDisk, HangDisk, DiskError, FullDisk, BitFlip, LostWrite, Misdirected:
		in.machine(f, n)
	case LeaderFalls:
		w.meta.fall()
		none := f.For/4 + time.Millisecond
		if f.Arg%4 == 1 {
			none += beyondLease
		}
		w.after(none, func() {
			if w.meta.leader == nil {
				w.meta.elect()
			}
		})
	case CutMeta:
		if f.Arg%2 == 1 {
			end += beyondLease
		}
		g.agentCut(end)
	case PowerFlush, Survivor:
		in.armed = append(in.armed, f)
	case Isolate:
		if f.Arg%2 == 1 {
			end += beyondLease
		}
		in.isolate(f, end)
	case Echo:
		in.echoUntil = max(in.echoUntil, end)
	case Takeover:
		w.boss.attach(g, true)
	case HandOver:
		w.boss.handOver(g)
	case Snapshot:
		w.boss.snapshot()
	case Look:
		w.boss.show(in.chosen(f))
	case Remove:
		w.boss.remove(in.chosen(f))
	case Clone:
		w.boss.clone(in.chosen(f))
	case Use:
		w.boss.use(in.clone(f))
	case Drop:
		w.boss.drop(in.clone(f))
	case Wish:
		w.boss.wish(f)
	case RollBack:
		w.boss.rollBack(in.chosen(f))
	case Drain:
		w.boss.drain(n, true)
		w.after(4*f.For+time.Second, func() { w.boss.drain(n, false) })
	case Copies:
		w.boss.copies(in.copies(f))
	case Handover:
		if a := w.boss.serving(); a != nil {
			a.g.detach()
		}
	default:
		in.process(f)
	}
}

// flushed is a flush, or a write with FUA, that has just been answered.
func (in *injector) flushed() {
	if len(in.armed) == 0 || in.healed {
		return
	}
	f := in.armed[0]
	w := in.w
	left := in.survivors(f)
	if f.Kind == Survivor && (left == nil || len(w.livingClones()) > 0) {
		in.armed = append(in.armed[1:], f)
		return
	}
	in.armed = in.armed[1:]
	w.note("fault", string(f.Kind), func() string { return "a flush is answered" })
	for i, n := range w.nodes {
		how := func() { n.powerLoss(int(f.Arg % 100)) }
		if m := w.meta.member(n); f.Kind == Survivor && m != nil && !slices.Contains(left, n) {
			how = n.lose
		}
		in.down(i, true, true, how, f.For/4+time.Duration(i)*time.Millisecond)
	}
}

// survivors chooses an in-sync replica of each chunk that is to keep its disk;
// nil: not now, because a change of members is under way, or a chunk has none
// that holds all it accepted.
func (in *injector) survivors(f Fault) []*node {
	var left []*node
	for _, ch := range in.w.meta.chunks() {
		var able []*node
		for _, n := range in.w.nodes {
			if m := in.w.meta.member(n); holds(ch, n) && m != nil && m.InSync && n.lostAt == 0 {
				able = append(able, n)
			}
		}
		if len(able) == 0 || !in.w.meta.idle() || slices.ContainsFunc(in.w.nodes, func(n *node) bool { return n.gone }) {
			return nil
		}
		left = append(left, able[int(f.Arg>>8)%len(able)])
	}
	return left
}

// isolate cuts a host off, and has another one take its volume over.
func (in *injector) isolate(f Fault, end time.Duration) {
	w := in.w
	for i, g := range w.gates {
		for j, p := range g.paths {
			if (i == f.Host) != (j == f.Host) {
				p.toServer, p.toClient = max(p.toServer, end), max(p.toClient, end)
			}
		}
	}
	w.gates[f.Host].agentCut(end)
	if f.Gate != f.Host {
		w.after(time.Duration(f.Arg%3000)*time.Millisecond, func() {
			if !in.healed {
				w.boss.attach(w.gates[f.Gate], true)
			}
		})
	}
}

// machine is what happens to a store's machine or a gateway's.
func (in *injector) machine(f Fault, n *node) {
	w := in.w
	end := w.now + f.For
	switch f.Kind {
	case PauseStore, PauseGate:
		if f.Kind == PauseStore || w.shape.local {
			n.pausedUntil = max(n.pausedUntil, end)
		}
		if f.Kind == PauseGate || w.shape.local {
			w.gates[f.Host].pause(f.For)
		}
	case SlowDisk:
		n.disk.slow = time.Duration(1+f.Arg%30) * time.Millisecond
		w.after(f.For, func() { n.disk.slow = 0 })
	case HangDisk:
		n.disk.hungUntil = max(n.disk.hungUntil, end)
	case DiskError:
		n.disk.failNext, n.disk.failFor = true, f.For
	case FullDisk:
		in.everFull = true
		n.fullUntil = max(n.fullUntil, end)
	case BitFlip:
		n.rots = true
		blocks := uint64(diskBytes/ids.BlockSize) - 2
		n.disk.mem.Flip(int64(2+f.Arg%blocks)*ids.BlockSize+int64(f.Arg>>20%ids.BlockSize), uint(f.Arg))
	case LostWrite, Misdirected:
		n.disk.rot = f.Kind
	}
}

// process is the end of processes, and their return.
func (in *injector) process(f Fault) {
	w := in.w
	n := w.nodes[f.Host]
	keep := []int{0, 50, 99, int(f.Arg % 100)}[f.Arg/100%4]
	switch f.Kind {
	case KillStore:
		in.down(f.Host, true, w.shape.local, n.kill, f.For)
	case KillGate:
		in.down(f.Host, w.shape.local, true, n.kill, f.For)
	case KillHost:
		in.down(f.Host, true, true, n.kill, f.For)
	case KillAll:
		for i := range w.nodes {
			in.down(i, true, true, w.nodes[i].kill, f.For)
		}
	case PowerHost:
		in.down(f.Host, true, true, func() { n.powerLoss(keep) }, f.For)
	case PowerAll:
		for i, n := range w.nodes {
			in.down(i, true, true, func() { n.powerLoss(keep) }, f.For+time.Duration(i)*time.Millisecond)
		}
	case Amnesia:
		in.down(f.Host, true, w.shape.local, n.lose, f.For)
	}
}

// down ends a host's processes and starts them again later.
func (in *injector) down(i int, store, gate bool, how func(), d time.Duration) {
	w := in.w
	if gate {
		w.gates[i].kill()
	}
	if store {
		how()
	}
	w.after(d, func() {
		if store {
			w.nodes[i].start()
		}
		if gate {
			w.gates[i].start()
		}
	})
}

// replace is what an operator does about a store whose disk has failed: its
// process is started again.
func (in *injector) replace(n *node) {
	in.down(n.index, true, in.w.shape.local, n.kill, time.Millisecond)
}

// reset breaks a connection.
func (in *injector) reset(g *gateway, n *node) {
	if g.a == nil {
		return
	}
	for _, p := range g.a.peers {
		if l := p.link; l != nil && l.n == n && l.conn != nil {
			c := l.conn
			l.event(func() { l.down(c, "reset") })
		}
	}
}

// agentCut keeps the gateway from the metadata service until a time.
func (g *gateway) agentCut(until time.Duration) {
	if g.agent != nil {
		g.agent.blockedUntil = max(g.agent.blockedUntil, until)
	}
}

// chosen is the snapshot an operation is about; nil: there is none.
func (in *injector) chosen(f Fault) *snapshot {
	all := in.w.check.living()
	if len(all) == 0 {
		return nil
	}
	return all[int(f.Arg)%len(all)]
}

// clone is the clone an operation is about; nil: there is none.
func (in *injector) clone(f Fault) *clone {
	all := in.w.livingClones()
	if len(all) == 0 {
		return nil
	}
	return all[int(f.Arg)%len(all)]
}

// places is how many hosts take new chunks: not those that are drained, or about
// to be.
func (in *injector) places() int {
	return len(in.w.nodes) - len(in.w.boss.drained)
}

// copies is how many replicas the volume is to have; 0: this is not fair.
func (in *injector) copies(f Fault) int {
	w := in.w
	least := 2
	if w.shape.rot {
		least = 3
	}
	most := min(in.places(), 5)
	if w.shape.replicas < least || most < least {
		return 0
	}
	return least + int(f.Arg)%(most-least+1)
}
