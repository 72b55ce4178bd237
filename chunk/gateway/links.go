package gateway

import (
	"sync"

	"github.com/cairnstore/cairn/chunk/client"
	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/wire"
)

// peer is the link to one replica, as the engine counts its connections: a
// link opened anew counts from 1, the engine's generations only rise.
//
//	engine generation = base + link generation
type peer struct {
	v       *Volume
	replica int

	// guarded by v.mu
	local bool
	link  client.Link // nil while closed
	addr  string      // it dials
	base  uint64
	live  bool   // the link has a connection
	last  uint64 // highest engine generation used
}

// handler brings one link's events; a peer has a new one for every link. Events
// that come before the peer knows the link wait, so that nothing is sent into
// the void.
type handler struct {
	p    *peer
	base uint64

	mu    sync.Mutex // guards the fields below
	open  bool
	early []func()
}

var _ client.Handler = (*handler)(nil)

// event runs f, after the events before it.
func (h *handler) event(f func()) {
	h.mu.Lock()
	if !h.open {
		h.early = append(h.early, f)
		h.mu.Unlock()
		return
	}
	h.mu.Unlock()
	f()
}

// ready lets the events that waited happen, and from then on all at once.
func (h *handler) ready() {
	for {
		h.mu.Lock()
		early := h.early
		h.early = nil
		h.open = len(early) == 0
		h.mu.Unlock()
		if len(early) == 0 {
			return
		}
		for _, f := range early {
			f()
		}
	}
}

// Up implements client.Handler.
func (h *handler) Up(gen uint64) { h.event(func() { h.up(gen) }) }

func (h *handler) up(gen uint64) {
	v, p := h.p.v, h.p
	a := actionPool.Get().(*actions)
	v.mu.Lock()
	p.live, p.last = true, h.base+gen
	v.engine.Step(now(), &volume.Up{Replica: p.replica, Gen: h.base + gen}, &a.out)
	v.after(a)
	v.mu.Unlock()
	v.perform(a)
}

// Down implements client.Handler.
func (h *handler) Down(gen uint64, why string) { h.event(func() { h.down(gen, why) }) }

func (h *handler) down(gen uint64, why string) {
	v, p := h.p.v, h.p
	v.mu.Lock()
	p.live = p.live && p.last != h.base+gen
	v.mu.Unlock()
	v.step(&volume.Down{Replica: p.replica, Gen: h.base + gen, Why: why})
}

// Lost implements client.Handler.
func (h *handler) Lost(why string) {
	h.event(func() { h.p.v.step(&volume.Lost{Replica: h.p.replica, Why: why}) })
}

// Replies implements client.Handler.
func (h *handler) Replies(gen uint64, rs []*wire.Reply) {
	h.p.v.step(&volume.Replies{Replica: h.p.replica, Gen: h.base + gen, Replies: rs})
}

// linkWorker opens and closes a volume's links in the order the engine asked,
// on a goroutine of its own: a close waits for the link's goroutine, which may
// be the very one that carries out a step. Its queue holds two actions per
// change of a member's state at most, and members change by commits.
type linkWorker struct {
	v    *Volume
	done chan struct{}

	mu      sync.Mutex // guards the fields below; taken after Volume.mu
	cond    *sync.Cond
	queue   []volume.LinkAction
	stopped bool
}

func newLinkWorker(v *Volume) *linkWorker {
	w := &linkWorker{v: v, done: make(chan struct{})}
	w.cond = sync.NewCond(&w.mu)
	go w.run()
	return w
}

func (w *linkWorker) add(links []volume.LinkAction) {
	if len(links) == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.queue = append(w.queue, links...)
	w.cond.Signal()
}

func (w *linkWorker) run() {
	defer close(w.done)
	for {
		w.mu.Lock()
		for len(w.queue) == 0 && !w.stopped {
			w.cond.Wait()
		}
		if len(w.queue) == 0 {
			w.mu.Unlock()
			return
		}
		l := w.queue[0]
		w.queue = w.queue[1:]
		w.mu.Unlock()
		p := w.v.peer(l.Replica)
		p.close()
		if l.Open {
			p.open()
		}
	}
}

// stop closes every link after what is queued.
func (w *linkWorker) stop() {
	w.mu.Lock()
	w.stopped = true
	w.cond.Signal()
	w.mu.Unlock()
	<-w.done
	w.v.mu.Lock()
	peers := append([]*peer(nil), w.v.peers...)
	w.v.mu.Unlock()
	for _, p := range peers {
		if p != nil {
			p.close()
		}
	}
}

func (v *Volume) peer(i int) *peer {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.peers[i]
}

// open connects to the replica's store: by function call when it is in this
// process.
func (p *peer) open() {
	v := p.v
	v.mu.Lock()
	if v.engine.State() == volume.Ended {
		v.mu.Unlock()
		return
	}
	r := v.engine.Replica(p.replica)
	p.base = p.last
	h := &handler{p: p, base: p.base}
	sub, local := v.g.cfg.Local[r.Store]
	p.local, p.addr = local, r.Addr
	v.mu.Unlock()
	var l client.Link
	if local {
		l = client.Local(sub, h)
	} else {
		d := v.g.cfg.Dialer
		d.Prefer = uint64(v.id) + uint64(p.replica) // replicas of a volume take different paths, volumes too
		l = client.Dial(client.Config{Addr: r.Addr, Cluster: v.g.cfg.Cluster, Dialer: d}, h)
	}
	v.mu.Lock()
	p.link = l
	v.mu.Unlock()
	h.ready()
}

// close lets go of the link. Requests it held are answered by the engine's own
// account of the lost connection.
func (p *peer) close() {
	v := p.v
	v.mu.Lock()
	l := p.link
	p.link = nil
	v.mu.Unlock()
	if l == nil {
		return
	}
	l.Close()
	v.mu.Lock()
	p.live = false
	gen := p.last
	v.mu.Unlock()
	v.step(&volume.Down{Replica: p.replica, Gen: gen, Why: "link closed"})
}
