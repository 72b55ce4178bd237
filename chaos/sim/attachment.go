package sim

import (
	"fmt"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/wire"
)

// attachment is one attached volume: an engine and what carries out its
// actions.
type attachment struct {
	g      *gateway
	epoch  uint32
	id     ids.VolumeID
	e      *volume.Engine
	peers  []*peer // by replica
	client *client
	side   *cloneSession                        // that uses a clone, instead of a client
	view   *view                                // of a snapshot, instead of a client
	cuts   map[*volume.Cut]func(volume.CutNews) // who hears of a cut
	dead   bool                                 // its process is gone, or it was closed
	ended  bool                                 // its engine has
	served bool                                 // it has served
	lease  time.Duration                        // of reads, by the gateway's clock, until then

	links   []volume.LinkAction // not carried out; bounded as chunk/gateway's
	linking bool
	outs    []*volume.Out // free
}

// peer is the link to one replica, as the engine counts its connections.
type peer struct {
	a       *attachment
	replica int
	local   *localLink
	link    *link
	base    uint64
	last    uint64 // highest engine generation used
}

func (a *attachment) takeOut() *volume.Out {
	if n := len(a.outs); n > 0 {
		out := a.outs[n-1]
		a.outs = a.outs[:n-1]
		return out
	}
	return &volume.Out{}
}

// step lets an event happen and carries out what follows.
func (a *attachment) step(ev volume.Event) {
	if a.dead {
		return
	}
	out := a.takeOut()
	a.e.Step(a.g.now(), ev, out)
	a.after(out)
}

// after notes what has changed and carries the actions out; sometimes a little
// later, as a goroutine would that was preempted behind the engine's lock.
func (a *attachment) after(out *volume.Out) {
	w := a.g.w
	for _, l := range out.Links {
		for len(a.peers) <= l.Replica {
			a.peers = append(a.peers, &peer{a: a, replica: len(a.peers)})
		}
	}
	a.links = append(a.links, out.Links...)
	a.workLinks()
	if a.client != nil && a.e.State() == volume.Serving && !a.served {
		a.served = true
		w.check.serving(a)
	}
	w.check.stepped(a)
	for _, n := range out.Cuts {
		a.cuts[n.Cut](n)
	}
	bound := a.bind(out)
	if w.chance(100) {
		a.g.later(w.span(0, 3*time.Millisecond), func() { a.perform(out, bound) })
		return
	}
	a.perform(out, bound)
}

// outbox is the requests of one step for one connection.
type outbox struct {
	link  *link
	local *localLink
	gen   uint64
	reqs  []*wire.Request
}

// bind finds the connection each request is meant for.
func (a *attachment) bind(out *volume.Out) []outbox {
	var boxes []outbox
	for i := range out.Sends {
		s := &out.Sends[i]
		p := a.peers[s.Replica]
		if (p.link == nil && p.local == nil) || s.Gen <= p.base {
			continue
		}
		k := 0
		for k < len(boxes) && (boxes[k].link != p.link || boxes[k].local != p.local) {
			k++
		}
		if k == len(boxes) {
			boxes = append(boxes, outbox{link: p.link, local: p.local, gen: s.Gen - p.base})
		}
		boxes[k].reqs = append(boxes[k].reqs, s.Req)
	}
	return boxes
}

// perform carries out the actions of a step: remote sends, local ones, calls to
// metadata, and the operations that are done.
func (a *attachment) perform(out *volume.Out, boxes []outbox) {
	for _, b := range boxes {
		if b.link != nil {
			b.link.send(b.gen, b.reqs)
		}
	}
	for _, b := range boxes {
		if b.local != nil {
			b.local.send(b.reqs)
		}
	}
	for _, c := range out.Meta {
		if a.client != nil {
			a.g.w.check.asked(a, c)
		}
		a.callMeta(c)
	}
	for _, d := range out.Done {
		switch {
		case a.view != nil:
			a.view.done(d)
		case a.side != nil:
			a.side.done(d)
		default:
			a.client.done(d)
		}
	}
	out.Reset()
	a.outs = append(a.outs, out)
}

// workLinks opens and closes links in the order the engine asked, one at a
// time, as the gateway's link worker does.
func (a *attachment) workLinks() {
	if a.linking || len(a.links) == 0 {
		return
	}
	a.linking = true
	a.g.later(a.g.w.span(5*time.Microsecond, 200*time.Microsecond), func() {
		if a.dead {
			return
		}
		l := a.links[0]
		a.links = a.links[1:]
		p := a.peers[l.Replica]
		p.close()
		if l.Open {
			p.open()
		}
		a.linking = false
		a.workLinks()
	})
}

// close gives the attachment up: its engine is fenced and its links go.
func (a *attachment) close() {
	a.step(&volume.Fence{Why: "closed"})
	a.abandon()
}

// abandon is the end of whoever used it, and of its links.
func (a *attachment) abandon() {
	a.dead = true
	if a.client != nil {
		a.client.abandon()
	}
	for _, p := range a.peers {
		if p.link != nil {
			p.link.close()
		}
		if p.local != nil {
			p.local.closed = true
		}
	}
}

// allInSync reports whether the engine serves with every member in sync.
func (a *attachment) allInSync() bool {
	in := a.e.Info()
	if in.State != volume.Serving {
		return false
	}
	for _, r := range in.Replicas {
		if r.State != "in-sync" && r.State != "gone" {
			return false
		}
	}
	return in.Caring == "" || !a.g.w.canCare()
}

func (p *peer) open() {
	a := p.a
	if a.e.State() == volume.Ended {
		return
	}
	p.base = p.last
	n := a.g.w.nodeOf(a.e.Replica(p.replica).Store)
	if a.g.local && n == a.g.node {
		p.local = &localLink{p: p, n: n}
		p.upped(1)
		return
	}
	p.link = &link{p: p, n: n}
	p.link.dial(0)
}

func (p *peer) close() {
	switch {
	case p.link != nil:
		p.link.close()
		p.link = nil
	case p.local != nil:
		p.local.closed = true
		p.local = nil
	default:
		return
	}
	p.a.step(&volume.Down{Replica: p.replica, Gen: p.last, Why: "link closed"})
}

func (p *peer) upped(gen uint64) {
	p.last = p.base + gen
	p.note("up", "")
	p.a.step(&volume.Up{Replica: p.replica, Gen: p.last})
}

func (p *peer) downed(gen uint64, why string) {
	p.note("down", why)
	p.a.step(&volume.Down{Replica: p.replica, Gen: p.base + gen, Why: why})
}

func (p *peer) lost(why string) {
	p.note("lost", why)
	p.a.step(&volume.Lost{Replica: p.replica, Why: why})
}

func (p *peer) note(what, why string) {
	a := p.a
	a.g.w.note(a.g.name, "link "+what, func() string {
		return fmt.Sprintf("epoch %d, replica %d on %s, connection %d %s", a.epoch, p.replica, a.e.Replica(p.replica).Host, p.last, why)
	}, uint64(a.epoch), uint64(p.replica), p.last)
}

func (p *peer) replies(gen uint64, rs []*wire.Reply) {
	w := p.a.g.w
	for _, r := range rs {
		w.mix(r.ID ^ uint64(r.Kind)<<56 ^ uint64(r.Status)<<48)
		w.mix(uint64(w.now) ^ uint64(r.Version))
		if w.traces != nil {
			w.traces = append(w.traces, Line{w.now, p.a.g.name, "reply", fmt.Sprintf("%s from %s: %s %s", r.Kind, p.a.e.Replica(p.replica).Host, r.Status, r.Detail)})
		}
	}
	p.a.step(&volume.Replies{Replica: p.replica, Gen: p.base + gen, Replies: rs})
}

// localLink is the in-process twin: requests are function calls, answers come
// whenever the store gives them, possibly inside the call.
type localLink struct {
	p      *peer
	n      *node
	closed bool
	tap    wire.Sink // takes the replies to a checker's question
}

func (l *localLink) send(reqs []*wire.Request) {
	if l.closed || !l.n.up() {
		return
	}
	l.n.submit(l, reqs)
}

// Replies implements wire.Sink.
func (l *localLink) Replies(rs []*wire.Reply) {
	if l.tap != nil {
		l.tap.Replies(rs)
		return
	}
	if l.closed || l.p.a.dead {
		return
	}
	l.p.replies(1, rs)
}

var _ wire.Sink = (*localLink)(nil)
