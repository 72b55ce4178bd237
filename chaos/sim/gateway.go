package sim

import (
	"fmt"
	"slices"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	tickEvery  = 50 * time.Millisecond
	renewEvery = 2 * time.Second
)

// clock is CLOCK_BOOTTIME of one host: another zero, and not quite the speed of
// the world. It counts while a process is stopped.
type clock struct {
	zero  time.Duration
	drift float64 // −0.025 to 0.025
}

func newClock(w *world) clock {
	return clock{zero: w.span(0, time.Hour), drift: float64(w.rng.IntN(51)-25) / 1000}
}

func (c clock) at(t time.Duration) time.Duration {
	return c.zero + t + time.Duration(float64(t)*c.drift)
}

// until says how long, in the world's time, it is to a moment of the clock.
func (c clock) until(moment, t time.Duration) time.Duration {
	return time.Duration(float64(moment-c.at(t))/(1+c.drift)) + time.Microsecond
}

// gateway is one gateway process: what chunk/gateway does, without goroutines.
type gateway struct {
	w     *world
	index int
	name  string
	host  string
	node  *node // on the same host
	local bool  // and in the same process: both die together
	clock clock
	paths []*path // to each node
	agent *agent

	life        int
	up          bool
	session     string
	pausedUntil time.Duration
	awakeAt     time.Duration // when it went on after it was paused last
	held        []func()      // what happens once it goes on
	a           *attachment
	views       []*view       // of snapshots
	sides       []*attachment // of clones
	attaching   bool
}

func newGateway(w *world, i int, local bool) *gateway {
	g := &gateway{w: w, index: i, name: fmt.Sprintf("gate-%d", i+1), host: w.nodes[i].host, node: w.nodes[i], local: local, clock: newClock(w)}
	for range w.nodes {
		g.paths = append(g.paths, &path{})
	}
	return g
}

func (g *gateway) now() time.Duration { return g.clock.at(g.w.now) }

// event lets f happen in the process: later if it is stopped, never if it is
// another one by then.
func (g *gateway) event(f func()) {
	switch {
	case !g.up:
	case g.pausedUntil > g.w.now:
		g.held = append(g.held, f)
	default:
		f()
	}
}

// later lets f happen in this process after d of the world's time.
func (g *gateway) later(d time.Duration, f func()) {
	life := g.life
	g.w.after(d, func() {
		if g.life == life {
			g.event(f)
		}
	})
}

func (g *gateway) start() {
	if g.up {
		return
	}
	g.life++
	g.up, g.session = true, fmt.Sprintf("%s-%d", g.host, g.life)
	g.agent = newAgent(g.w, g.session, g.host, g.event)
	g.w.note(g.name, "start", func() string { return "session " + g.session })
	g.ticks()
	g.renews(g.life)
	g.w.boss.started(g)
}

// kill ends the process: nothing it was asked is answered.
func (g *gateway) kill() {
	if !g.up {
		return
	}
	g.w.note(g.name, "kill", func() string { return "" })
	if a := g.a; a != nil {
		a.abandon()
	}
	for _, v := range g.views {
		v.over = true
		if v.a != nil {
			v.a.abandon()
		}
	}
	g.agent.close()
	for _, a := range slices.Clone(g.sides) {
		a.abandon()
		a.side.end()
	}
	g.views, g.sides = nil, nil
	g.up, g.a, g.attaching, g.held, g.pausedUntil = false, nil, false, nil, 0
	g.life++
}

// pause stops the process, as SIGSTOP does.
func (g *gateway) pause(d time.Duration) {
	if !g.up || g.pausedUntil > g.w.now {
		return
	}
	g.pausedUntil = g.w.now + d
	life := g.life
	g.w.after(d, func() {
		if g.life != life {
			return
		}
		held := g.held
		g.held, g.pausedUntil, g.awakeAt = nil, 0, g.w.now
		for _, f := range held {
			if g.life == life {
				f()
			}
		}
	})
}

func (g *gateway) ticks() {
	g.later(tickEvery, func() {
		if a := g.a; a != nil && a.e.State() != volume.Ended {
			a.step(&volume.Tick{})
		}
		for _, a := range slices.Clone(g.sides) {
			a.step(&volume.Tick{})
		}
		for _, v := range slices.Clone(g.views) {
			if v.a != nil {
				v.a.step(&volume.Tick{})
			}
		}
		g.ticks()
	})
}

func (g *gateway) renews(life int) {
	g.later(time.Duration(float64(renewEvery)/(1+g.clock.drift)), func() {
		g.renew()
		g.renews(life)
	})
}

// renew is the host's heartbeat.
func (g *gateway) renew() {
	for _, a := range append([]*attachment{g.a}, g.sides...) {
		if a != nil && a.e.State() != volume.Ended {
			g.renewOne(a)
		}
	}
}

func (g *gateway) renewOne(a *attachment) {
	req := &pb.RenewRequest{Host: g.host, Session: g.session, Leases: []*pb.Lease{{VolumeId: uint64(a.id), Epoch: a.epoch}}}
	sent := g.now()
	g.agent.renew(req, func(rep *pb.RenewReply) {
		if a.e.State() == volume.Ended {
			return
		}
		if len(rep.Refused) > 0 {
			a.step(&volume.Fence{Why: "metadata has given the volume to another writer"})
			return
		}
		for _, v := range rep.Volumes {
			a.step(&volume.Refresh{Volume: v})
		}
		a.lease = max(a.lease, sent+time.Duration(rep.LeaseMs)*time.Millisecond)
		a.step(&volume.Lease{Until: sent + time.Duration(rep.LeaseMs)*time.Millisecond})
	})
}

// attach makes this gateway the volume's writer; done hears how it went.
func (g *gateway) attach(takeover, alone bool, done func(error)) {
	if !g.up || g.attaching || g.a != nil && g.a.e.State() != volume.Ended {
		done(nil)
		return
	}
	g.attaching = true
	at := &pb.Attach{Volume: volumeName, Host: g.host, Session: g.session, Takeover: takeover, PredecessorGone: alone}
	g.agent.do(&pb.Command{Op: &pb.Command_Attach{Attach: at}}, func(res *pb.Result, err error) {
		g.attaching = false
		if err == nil {
			g.attached(res)
		}
		done(err)
	})
}

func (g *gateway) attached(res *pb.Result) {
	w, v := g.w, res.Volume
	w.check.attachReturned(v.Epoch)
	w.stats.Attaches++
	w.note(g.name, "attached", func() string { return fmt.Sprintf("epoch %d, revision %d", v.Epoch, v.Revision) }, uint64(v.Epoch), v.Revision)
	a := &attachment{g: g, epoch: v.Epoch, id: ids.VolumeID(v.Id), cuts: map[*volume.Cut]func(volume.CutNews){}}
	a.client = newClient(w, a)
	out := a.takeOut()
	e, err := volume.New(g.now(), volume.Config{Host: g.host, Volume: v, Chunks: res.Chunks, Grace: w.shape.grace}, out)
	if err != nil {
		w.violate("P8", "metadata answers an attach with a volume that cannot be: %v", err)
		return
	}
	a.e = e
	if old := g.a; old != nil {
		old.close()
	}
	g.a = a
	a.after(out)
	g.renew()
	a.client.start()
}

// detach lets go gracefully, or now and then by force.
func (g *gateway) detach() {
	if g.a != nil && g.a.e.State() == volume.Serving {
		g.a.step(&volume.Detach{Force: g.w.now/time.Millisecond%4 == 0})
	}
}

func (g *gateway) picture() string {
	switch {
	case !g.up:
		return g.name + " down"
	case g.a == nil:
		return fmt.Sprintf("%s idle (attaching %v)", g.name, g.attaching)
	}
	in := g.a.e.Info()
	out := fmt.Sprintf("%s epoch %d revision %d %s %q floor %s in flight %d, paused until %v, unanswered %d:", g.name, in.Epoch, in.Revision, in.State, in.Why, in.Floor, in.InFlight, g.pausedUntil, g.a.client.busy())
	for _, r := range in.Replicas {
		out += fmt.Sprintf(" %s=%s", r.Host, r.State)
	}
	if in.Caring != "" {
		out += ", cares for " + in.Caring
	}
	return out
}

// callMeta asks the metadata service and brings the answer.
func (a *attachment) callMeta(c *volume.MetaCall) {
	g := a.g
	cmd := &pb.Command{}
	switch {
	case c.Look:
		a.look(c)
		return
	case c.Prune != nil:
		cmd.Op = &pb.Command_PruneLayer{PruneLayer: c.Prune}
	case c.Change != nil:
		cmd.Op = &pb.Command_ChangeMembers{ChangeMembers: c.Change}
	case c.HandOver != nil:
		cmd.Op = &pb.Command_HandOver{HandOver: c.HandOver}
	case c.Move != nil:
		cmd.Op = &pb.Command_MoveChunks{MoveChunks: c.Move}
	case c.Allocate != nil:
		cmd.Op = &pb.Command_Allocate{Allocate: c.Allocate}
	default:
		g.agent.do(&pb.Command{Op: &pb.Command_Detach{Detach: c.Detach}}, func(*pb.Result, error) {})
		return
	}
	g.agent.do(cmd, func(res *pb.Result, err error) {
		if a.dead {
			return
		}
		conflict := status.Of(err) == status.Conflict
		for _, m := range res.GetMembers() {
			conflict = conflict || status.Kind(m.Status) == status.Conflict
		}
		a.step(&volume.MetaDone{Call: c, Result: res, Err: err})
		if c.HandOver != nil && err == nil {
			g.w.boss.handedOver(c.HandOver)
		}
		if conflict {
			a.refresh()
		}
	})
}

// look brings what an engine may ask for.
func (a *attachment) look(c *volume.MetaCall) {
	if a.view != nil {
		a.view.lookAgain(c)
		return
	}
	a.refresh()
	query(a.g.agent, func(kv state.KV) []*pb.OriginState { return state.Origins(kv, state.VolumeByID(kv, uint64(a.id))) }, func(states []*pb.OriginState) {
		if len(states) > 0 {
			a.step(&volume.Origins{States: states, Call: c})
		}
		a.step(&volume.MetaDone{Call: c})
	})
}

// refresh brings the volume as metadata knows it.
func (a *attachment) refresh() {
	query(a.g.agent, func(kv state.KV) *pb.Volume { return state.Leaving(kv, state.VolumeByID(kv, uint64(a.id))) }, func(v *pb.Volume) {
		if v != nil {
			a.step(&volume.Refresh{Volume: v})
		}
	})
}
