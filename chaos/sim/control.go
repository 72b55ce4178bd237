package sim

import (
	"fmt"
	"slices"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/pb"
)

// controller is the operator, and the hosts' own recovery: whenever nobody has
// the volume attached, somebody gets it.
type controller struct {
	w       *world
	drained map[string]bool   // hosts, from the asking on
	turns   map[string][]bool // hosts whose drain, or its end, is asked for: what is asked for since
	wanted  []int             // numbers of replicas that are asked for
	asked   int               // commands, for the names of sessions
	asking  bool
	idleAt  time.Duration // since when nobody has it; 0: somebody has
	cutter  *attachment   // a snapshot is being taken there; nil: none is
	cutting time.Duration // until then at most
	taken   int           // snapshots, for their names
	rolling bool          // nobody is to have it: it is to be rolled back
}

const lookEvery = 50 * time.Millisecond

// boot makes the cluster and its one volume.
func (w *world) boot() {
	b := &controller{w: w, drained: map[string]bool{}, turns: map[string][]bool{}}
	w.boss = b
	ready := false
	hosts := 0
	for _, n := range w.nodes {
		b.do(&pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: n.host, DataAddr: n.host + ":1"}}}}, func() {
			n.start()
			hosts++
		})
	}
	stores := func() bool { return hosts == len(w.nodes) && w.meta.idle() }
	if !w.runUntil(time.Minute, stores) {
		w.violate("sim", "the hosts cannot be registered")
		return
	}
	b.do(&pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: volumeName, SizeBytes: volumeBytes,
		Replicas: uint32(w.shape.replicas), ChunkBytes: chunkBytes}}}, func() { ready = true })
	if !w.runUntil(time.Minute, func() bool { return ready }) {
		w.violate("sim", "the volume cannot be created")
		return
	}
	for _, g := range w.gates {
		g.start()
	}
	b.look()
}

// do asks as `cairn` does, in a session of its own each time: one kept for hours
// would expire.
func (b *controller) do(cmd *pb.Command, then func()) {
	b.asked++
	newAgent(b.w, fmt.Sprintf("admin-%d", b.asked), "", func(f func()) { f() }).do(cmd, func(_ *pb.Result, err error) {
		if err != nil {
			b.w.violate("P8", "metadata refuses the operator: %v", err)
			return
		}
		then()
	})
}

// look is a loop: it sees to it that somebody has the volume.
func (b *controller) look() {
	w := b.w
	w.after(lookEvery, func() {
		b.look()
		v := w.meta.volume()
		for _, g := range w.gates {
			if g.attaching || g.a != nil && g.a.epoch >= v.Epoch && g.a.e.State() != volume.Ended {
				b.idleAt = 0
				return
			}
		}
		if b.idleAt == 0 {
			b.idleAt = w.now
		}
		if b.asking || b.rolling || w.now-b.idleAt < 200*time.Millisecond {
			return
		}
		b.take(v)
	})
}

// take has some gateway attach the volume: the one that held it, or, after a
// while, any.
func (b *controller) take(v *pb.Volume) {
	w := b.w
	var able []*gateway
	for _, g := range w.gates {
		if g.up && g.pausedUntil <= w.now && g.agent.blockedUntil <= w.now {
			able = append(able, g)
		}
	}
	if len(able) == 0 {
		return
	}
	g := able[w.rng.IntN(len(able))]
	for _, o := range able {
		if o.host == v.HolderHost && w.chance(2) {
			g = o
		}
	}
	b.attach(g, v.HolderHost != g.host)
}

func (b *controller) attach(g *gateway, takeover bool) {
	b.asking = true
	b.w.note("operator", "attach", func() string { return "on " + g.host })
	life := g.life
	g.attach(takeover, true, func(error) { b.asking = false })
	b.w.after(25*time.Second, func() { // the process may be gone
		if g.life != life {
			b.asking = false
		}
	})
}

// started is a gateway process that has begun: it attaches what its host held.
func (b *controller) started(g *gateway) {
	b.asking = false
	g.later(b.w.span(time.Millisecond, 50*time.Millisecond), func() {
		if v := b.w.meta.volume(); v != nil && v.HolderHost == g.host && v.HolderSession != g.session {
			g.attach(false, true, func(error) {})
		}
	})
}

// serving returns the attachment of the newest epoch, if it serves.
func (b *controller) serving() *attachment {
	v := b.w.meta.volume()
	for _, g := range b.w.gates {
		if g.up && g.a != nil && g.a.epoch == v.GetEpoch() && g.a.e.State() == volume.Serving && g.pausedUntil <= b.w.now {
			return g.a
		}
	}
	return nil
}

// drain asks for a host's chunks to go elsewhere, or takes that back.
func (b *controller) drain(n *node, on bool) {
	if on {
		b.drained[n.host] = true
	}
	if _, asked := b.turns[n.host]; asked { // else the last one to be asked might come first
		b.turns[n.host] = append(b.turns[n.host], on)
		return
	}
	b.turns[n.host] = nil
	b.w.note("operator", "drain", func() string { return fmt.Sprintf("%s %v", n.host, on) })
	b.do(&pb.Command{Op: &pb.Command_SetHost{SetHost: &pb.SetHost{Host: n.host, Drained: on}}}, func() {
		if !on {
			delete(b.drained, n.host)
		}
		then := b.turns[n.host]
		delete(b.turns, n.host)
		if len(then) > 0 {
			b.drain(n, then[len(then)-1])
		}
	})
}

// copies asks for another number of replicas.
func (b *controller) copies(n int) {
	b.w.note("operator", "replicas", func() string { return fmt.Sprint(n) })
	b.wanted = append(b.wanted, n)
	b.do(&pb.Command{Op: &pb.Command_SetReplicas{SetReplicas: &pb.SetReplicas{Volume: volumeName, Replicas: uint32(n)}}}, func() {
		at := slices.Index(b.wanted, n)
		b.wanted = slices.Delete(b.wanted, at, at+1)
	})
}

// wish brings the writer a move that placement wants; it may be one that is not
// possible.
func (b *controller) wish(f Fault) {
	a, chunks := b.serving(), b.w.meta.chunks()
	if a == nil || len(chunks) == 0 {
		return
	}
	c := chunks[int(f.Arg)%len(chunks)]
	from, to := c.Stores[int(f.Arg>>8)%len(c.Stores)], b.w.nodes[f.Host].id
	b.w.note("operator", "wish", func() string { return fmt.Sprintf("chunk %d from %x to %s", c.Index, from[:1], b.w.nodes[f.Host].host) })
	a.step(&volume.Wish{Moves: []*pb.ChunkWish{{Index: c.Index, From: from, To: to[:]}}})
}

// handOver has the writer give the volume to another gateway.
func (b *controller) handOver(to *gateway) {
	if a := b.serving(); a != nil && a.g != to && to.up {
		b.w.note("operator", "hand over", func() string { return "to " + to.host })
		a.step(&volume.HandOver{Host: to.host, Session: to.session})
		b.w.after(5*time.Second, func() { a.step(&volume.HandOver{}) }) // not in time: it stays
	}
}

// handedOver is the new holder's turn, if its process still is the one.
func (b *controller) handedOver(op *pb.HandOver) {
	for _, g := range b.w.gates {
		if g.up && g.session == op.Session {
			b.attach(g, false)
		}
	}
}
