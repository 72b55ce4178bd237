package gateway

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cairnstore/cairn/chunk/client"
	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/placement"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Volume is one attached volume: an engine and what carries out its actions.
type Volume struct {
	g     *Gateway
	name  string
	id    ids.VolumeID
	epoch ids.Epoch

	chunkBytes uint64
	heat       placement.Meter

	ctx    context.Context
	cancel context.CancelFunc
	links  *linkWorker
	ended  chan struct{} // closed when the engine has ended
	wg     sync.WaitGroup

	shrinking sync.Mutex // held by the one shrink there may be

	size  atomic.Uint64
	state atomic.Uint32 // volume.State

	mu     sync.Mutex // guards the engine and the fields below
	engine *volume.Engine
	peers  []*peer // by replica; nil until its link was first asked for
	letGo  error   // why metadata did not let go of it
	hand   *party  // the hand-over under way; nil: none

	// Of snapshots (snapshot.go).
	snapshot string // shown read-only; "": this is the volume itself
	prepared *pb.Volume
	held     *heldCut
	cuts     map[*volume.Cut]chan volume.CutNews
}

func newVolume(g *Gateway, vol *pb.Volume, cfg volume.Config, snapshot string) (*Volume, error) {
	v := &Volume{g: g, name: vol.Name, id: ids.VolumeID(vol.Id), epoch: ids.Epoch(vol.Epoch), chunkBytes: vol.ChunkBytes, ended: make(chan struct{}),
		cuts: map[*volume.Cut]chan volume.CutNews{}, snapshot: snapshot}
	v.ctx, v.cancel = context.WithCancel(g.ctx)
	v.links = newLinkWorker(v)
	cfg.Host, cfg.Volume, cfg.Stall = g.cfg.Host, vol, g.cfg.Stall
	cfg.Grace, cfg.Budget = g.cfg.Grace, g.budget
	a := &actions{}
	v.mu.Lock()
	e, err := volume.New(now(), cfg, &a.out)
	if err != nil {
		v.mu.Unlock()
		v.cancel()
		v.links.stop()
		return nil, err
	}
	v.engine = e
	v.after(a)
	v.mu.Unlock()
	v.perform(a)
	return v, nil
}

// actions is what one step asks for, with the connections as they were then.
type actions struct {
	out   volume.Out
	sends []outbox // by replica
}

type outbox struct {
	link  client.Link
	local bool
	gen   uint64          // of the link
	reqs  []*wire.Request // a link has copied what it needs when Send returns
}

var actionPool = sync.Pool{New: func() any { return new(actions) }}

// step lets an event happen and carries out what follows, on this goroutine.
func (v *Volume) step(ev volume.Event) {
	a := actionPool.Get().(*actions)
	v.mu.Lock()
	v.engine.Step(now(), ev, &a.out)
	v.after(a)
	v.mu.Unlock()
	v.perform(a)
}

// after notes, under the lock, what the actions depend on: which connection
// each send is meant for. Requests of a connection that is gone are dropped:
// the engine has given them up, or will when it hears of it.
func (v *Volume) after(a *actions) {
	for i := range a.out.Sends {
		s := &a.out.Sends[i]
		p := v.peers[s.Replica]
		if p.link == nil || s.Gen <= p.base {
			continue
		}
		for len(a.sends) <= s.Replica {
			a.sends = append(a.sends, outbox{})
		}
		b := &a.sends[s.Replica]
		b.link, b.local, b.gen = p.link, p.local, s.Gen-p.base
		b.reqs = append(b.reqs, s.Req)
	}
	for _, l := range a.out.Links {
		for len(v.peers) <= l.Replica {
			v.peers = append(v.peers, nil)
		}
		if v.peers[l.Replica] == nil {
			v.peers[l.Replica] = &peer{v: v, replica: l.Replica}
		}
	}
	v.links.add(a.out.Links)
	v.wg.Add(len(a.out.Meta))
	v.size.Store(v.engine.Size())
	st := v.engine.State()
	if volume.State(v.state.Swap(uint32(st))) != volume.Ended && st == volume.Ended {
		close(v.ended)
	}
}

// perform carries out the actions: sends to remote stores first, so that they
// work while the local one does.
func (v *Volume) perform(a *actions) {
	for _, local := range [...]bool{false, true} {
		for i := range a.sends {
			if b := &a.sends[i]; len(b.reqs) > 0 && b.local == local {
				b.link.Send(b.gen, b.reqs)
			}
		}
	}
	for _, n := range a.out.Cuts {
		v.cutNews(n)
	}
	for _, l := range a.out.Listed {
		l.List.User.(chan volume.Listed) <- l // has room for it
	}
	for _, c := range a.out.Meta {
		go v.callMeta(c)
	}
	complete(a.out.Done)
	a.out.Reset()
	for i := range a.sends {
		clear(a.sends[i].reqs)
		a.sends[i] = outbox{reqs: a.sends[i].reqs[:0]}
	}
	actionPool.Put(a)
}

// complete gives operations back, in runs of the same client.
func complete(ds []volume.Done) {
	for len(ds) > 0 {
		n := 1
		for n < len(ds) && ds[n].Op.User == ds[0].Op.User {
			n++
		}
		if c, ok := ds[0].Op.User.(volume.Completer); ok {
			c.Complete(ds[:n])
		}
		ds = ds[n:]
	}
}

// callMeta asks the metadata service and brings the answer. The client asks
// again, with the same key, while the outcome is unknown.
func (v *Volume) callMeta(c *volume.MetaCall) {
	defer v.wg.Done()
	var res *pb.Result
	var err error
	ctx := v.ctx
	switch {
	case c.Change != nil:
		res, err = v.g.members.do(ctx, c.Change)
	case c.Prune != nil:
		res, err = v.g.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_PruneLayer{PruneLayer: c.Prune}})
	case c.Look:
		err = v.lookAgain(ctx, c)
	case c.Move != nil:
		res, err = v.g.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_MoveChunks{MoveChunks: c.Move}})
	case c.HandOver != nil:
		v.mu.Lock()
		p := v.hand
		v.mu.Unlock()
		if p == nil {
			err = status.Errorf(status.Invalid, "the hand-over of volume %s was given up", v.name)
			break
		}
		defer p.told.Done()
		err = p.ask(v, c.HandOver)
	case c.Allocate != nil:
		res, err = v.g.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_Allocate{Allocate: c.Allocate}})
	default:
		// The engine has ended: only the volume's close may cut this short.
		_, err = v.g.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_Detach{Detach: c.Detach}})
		v.detached(err)
		return
	}
	conflict := status.Of(err) == status.Conflict
	for _, m := range res.GetMembers() {
		conflict = conflict || status.Kind(m.Status) == status.Conflict
	}
	if err != nil && !conflict {
		v.g.log.Warn("metadata refused", "volume", v.name, "err", err)
	}
	v.step(&volume.MetaDone{Call: c, Result: res, Err: err})
	if conflict {
		if err := v.refresh(ctx); err != nil {
			v.g.log.Warn("volume not read again after a conflict", "volume", v.name, "err", err)
		}
	}
}

// refresh brings the volume as metadata knows it, with its map if chunks were
// cut out of it.
func (v *Volume) refresh(ctx context.Context) error {
	q := &pb.QueryRequest{Q: &pb.QueryRequest_Volume{Volume: fmt.Sprintf("id:%d", v.id)}}
	for {
		rep, err := v.g.cfg.Meta.Query(ctx, q)
		if err != nil {
			return err
		}
		if len(rep.Volumes) != 1 {
			return status.Errorf(status.NotFound, "metadata does not know volume %s any more", v.name)
		}
		v.mu.Lock()
		cut := rep.Volumes[0].Cuts != v.engine.Cuts()
		v.mu.Unlock()
		if cut && !q.WithChunks {
			q.WithChunks = true
			continue
		}
		v.step(&volume.Refresh{Volume: rep.Volumes[0], Chunks: rep.Chunks, Whole: q.WithChunks})
		return nil
	}
}

// Name returns the volume's name when it was attached.
func (v *Volume) Name() string { return v.name }

// Size returns the volume's size in bytes.
func (v *Volume) Size() uint64 { return v.size.Load() }

// ReadOnly reports whether writes are refused.
func (v *Volume) ReadOnly() bool { return v.snapshot != "" }

// State returns what the engine is doing.
func (v *Volume) State() volume.State { return volume.State(v.state.Load()) }

// Submit brings operations of a client; each comes back through the
// volume.Completer in its User.
func (v *Volume) Submit(ops []*volume.Op) {
	v.count(ops)
	v.step(&volume.Submit{Ops: ops})
}

// Extents describes a range by the thin map.
func (v *Volume) Extents(off, n uint64) []volume.Extent {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.engine.Extents(off, n)
}

// Info returns a picture of the engine.
func (v *Volume) Info() volume.Info {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.engine.Info()
}

// Slowest returns the slowest operations of the last minute or two.
func (v *Volume) Slowest() []volume.Slow {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.engine.Slowest()
}

// waiter is a Completer for one operation.
type waiter chan status.Kind

// Complete implements volume.Completer.
func (w waiter) Complete(ds []volume.Done) {
	for _, d := range ds {
		w <- d.Status
	}
}

// settle flushes what was written so far.
func (v *Volume) settle(ctx context.Context) error {
	if v.State() == volume.Ended {
		return nil
	}
	w := make(waiter, 1)
	v.Submit([]*volume.Op{{Kind: volume.OpFlush, User: w}})
	select {
	case k := <-w:
		return status.New(k, fmt.Sprintf("flush of volume %s: %s", v.name, k))
	case <-ctx.Done():
		return status.Errorf(status.Timeout, "the flush of volume %s takes too long: %s", v.name, v.Info().Why)
	}
}

// detachWait bounds how long a detach waits for what is in flight, and
// forceFlush how long a forced one tries to make durable what was acknowledged.
const (
	detachWait = 10 * time.Second
	forceFlush = 2 * time.Second
)

// detach drains, flushes and waits until metadata has let go.
func (v *Volume) detach(ctx context.Context, force bool) error {
	if v.g.cfg.Gone != nil {
		v.g.cfg.Gone(v.name)
	}
	if force {
		fctx, cancel := context.WithTimeout(ctx, forceFlush)
		if err := v.settle(fctx); err != nil { // the next attach does it
			v.g.log.Warn("volume is let go by force without its last flush", "volume", v.name, "err", err)
		}
		cancel()
	}
	v.step(&volume.Detach{Force: force})
	wait, cancel := context.WithTimeout(ctx, detachWait)
	defer cancel()
	select {
	case <-v.ended:
	case <-wait.Done():
		why := v.undetached()
		v.step(&volume.Stay{})
		if v.State() != volume.Ended {
			return why
		}
	}
	done := make(chan struct{})
	go func() { v.wg.Wait(); close(done) }()
	select {
	case <-done:
		return v.detachErr()
	case <-ctx.Done():
		return status.Errorf(status.Unknown, "volume %s is flushed, but metadata has not answered whether it is free: ask again", v.name)
	}
}

// undetached says what a detach waits for and what to do.
func (v *Volume) undetached() error {
	in := v.Info()
	const force = "`cairn volume detach %s --force` lets it go now: of its writes only those are lost that nobody was told are done"
	if in.Full > 0 {
		return status.Errorf(status.NoSpace, "volume %s is still attached: %d of its writes wait for room on %s; remove or trim data, add a store, or "+force,
			v.name, in.Full, strings.Join(in.FullOn, ", "), v.name)
	}
	return status.Errorf(status.Timeout, "volume %s is still attached: %d of its writes are not done, or not flushed, after %v (`cairn volume show %s` has the state of its copies); try again, or "+force,
		v.name, in.InFlight, detachWait, v.name, v.name)
}

// detached notes how letting go went. Fenced is fine: somebody else has it.
func (v *Volume) detached(err error) {
	if err != nil && status.Of(err) != status.Fenced && v.ctx.Err() == nil {
		v.g.log.Warn("volume not let go", "volume", v.name, "err", err)
		v.mu.Lock()
		defer v.mu.Unlock()
		v.letGo = err
	}
}

func (v *Volume) detachErr() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.letGo
}

// close lets go of links and goroutines. The engine must have ended, or its
// epoch be given up: nothing is answered OK afterwards.
func (v *Volume) close() {
	v.step(&volume.Fence{Why: "closed"})
	v.cancel()
	v.wg.Wait()
	v.links.stop()
}

// ID returns the volume's id.
func (v *Volume) ID() ids.VolumeID { return v.id }

// WaitServing waits until the volume serves; ended or not in time is an error
// that says what it waits for.
func (v *Volume) WaitServing(ctx context.Context) error {
	w := make(waiter, 1)
	// The engine holds a flush back until it serves.
	v.Submit([]*volume.Op{{Kind: volume.OpFlush, User: w}})
	select {
	case k := <-w:
		if k != status.OK {
			return status.Errorf(k, "volume %s does not serve: %s", v.name, v.Info().Why)
		}
		return nil
	case <-ctx.Done():
		why := v.Info().Why
		if why == "" {
			why = "its stores have not answered"
		}
		return status.Errorf(status.Timeout, "volume %s is attached but does not serve yet: %s", v.name, why)
	}
}
