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
	maxClones    = 2
	sessionOps   = 25
	sessionLimit = 20 * time.Second
)

// clone is a volume that began as a snapshot. One session after the other uses it,
// one operation at a time: that makes what each register may hold a set.
//
//	durable ⊆ may
type clone struct {
	w       *world
	name    string
	of      *snapshot
	made    bool // metadata has it
	gone    bool // it is deleted, or about to be
	flat    bool // it reads from its origin no more
	may     []map[uint64]bool
	durable []map[uint64]bool // may hold after a power loss: of before the last flush, and all since
	session *cloneSession     // nil: nobody uses it
	epoch   uint32            // of the last session
}

// newClone enters a clone; its snapshot is known whole.
func newClone(w *world, name string, of *snapshot) *clone {
	c := &clone{w: w, name: name, of: of}
	for _, x := range of.shows {
		c.may = append(c.may, map[uint64]bool{x.ids[0]: true})
		c.durable = append(c.durable, map[uint64]bool{x.ids[0]: true})
	}
	return c
}

// wrote enters a write that has begun, or is done.
func (c *clone) wrote(at int, id uint64, done bool) {
	if done {
		clear(c.may[at])
	}
	c.may[at][id], c.durable[at][id] = true, true
}

// flushed: what each register may hold is all there can be after a power loss.
func (c *clone) flushed() {
	for i, m := range c.may {
		c.durable[i] = copySet(m)
	}
}

// lost is a power loss, of whomever: what was not flushed may be gone.
func (c *clone) lost() {
	for i, d := range c.durable {
		c.may[i] = copySet(d)
	}
}

func copySet(m map[uint64]bool) map[uint64]bool {
	out := make(map[uint64]bool, len(m))
	for id := range m {
		out[id] = true
	}
	return out
}

// read checks one register's bytes.
func (c *clone) read(at int, b []byte) {
	id, whole := decode(b)
	if !whole || !c.may[at][id] {
		c.w.violate("P1", "clone %s of snapshot %s (layer %d) shows value %d (whole %v) and not one of %v: %s", c.name, c.of.name, c.of.layer, id, whole, sorted(c.may[at]), c.w.check.order[at])
		return
	}
	clear(c.may[at])
	c.may[at][id] = true
}

func sorted(m map[uint64]bool) (out []uint64) {
	for id := range m {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

// cloneSession is one attachment of a clone.
type cloneSession struct {
	c      *clone
	a      *attachment
	left   int // operations to come
	all    bool
	copied bool // everything is its own and durable: it can be made flat
	over   bool
}

// open attaches a clone on a gateway; all: only to read everything.
func (c *clone) open(g *gateway, all bool) *cloneSession {
	s := &cloneSession{c: c, left: sessionOps, all: all}
	c.session = s
	c.w.note("operator", "use clone", func() string { return c.name + " on " + g.host })
	c.w.after(sessionLimit, s.end)
	at := &pb.Attach{Volume: c.name, Host: g.host, Session: g.session, Takeover: true}
	g.agent.do(&pb.Command{Op: &pb.Command_Attach{Attach: at}}, func(res *pb.Result, err error) {
		if err != nil || s.over {
			s.end()
			return
		}
		v := res.Volume
		c.epoch = v.Epoch
		query(g.agent, func(kv state.KV) []*pb.OriginState { return state.Origins(kv, state.VolumeByID(kv, v.Id)) }, func(origins []*pb.OriginState) {
			if !s.over {
				s.attached(g, v, res.Chunks, origins)
			}
		})
	})
	return s
}

func (s *cloneSession) attached(g *gateway, v *pb.Volume, chunks []*pb.Chunk, origins []*pb.OriginState) {
	a := &attachment{g: g, epoch: v.Epoch, id: ids.VolumeID(v.Id), side: s}
	out := a.takeOut()
	e, err := volume.New(g.now(), volume.Config{Host: g.host, Volume: v, Chunks: chunks, Origins: origins, Grace: g.w.shape.grace}, out)
	if err != nil {
		g.w.violate("P8", "metadata answers an attach with a clone that cannot be: %v", err)
		return
	}
	a.e, s.a = e, a
	g.sides = append(g.sides, a)
	a.after(out)
	g.renew()
	if s.all {
		s.readAll()
	} else {
		s.next()
	}
}

// readAll reads every register, and ends.
func (s *cloneSession) readAll() {
	s.left = 0
	var ops []*volume.Op
	for _, win := range windows {
		n := win.count * ids.BlockSize
		ops = append(ops, &volume.Op{Kind: volume.OpRead, Off: win.first * ids.BlockSize, Len: n, Data: make([]byte, n)})
	}
	left := len(ops)
	for _, o := range ops {
		s.do(o, func(k status.Kind) {
			if k == status.OK {
				eachIn(o.Off, o.Len, func(key, from, to uint64) { s.c.read(s.c.w.check.place[key], o.Data[from:to]) })
			} else if !s.c.w.faults.over {
				s.end()
			} else {
				s.c.w.violate("P7", "clone %s of a healthy cluster cannot be read: %s", s.c.name, k)
			}
			if left--; left == 0 {
				s.next()
			}
		})
	}
}

// next does one operation, or lets go.
func (s *cloneSession) next() {
	w, c := s.c.w, s.c
	if s.over || s.a.dead {
		return
	}
	if s.left--; s.left < 0 {
		s.a.step(&volume.Detach{})
		w.after(time.Second, s.end)
		return
	}
	at := w.rng.IntN(len(c.may))
	r := w.check.order[at]
	o := &volume.Op{Off: r.key * sectorBytes, Len: ids.BlockSize}
	if inParts(r.key / sectors) {
		o.Len = sectorBytes
	}
	switch k := w.rng.IntN(20); {
	case k < 9:
		o.Kind, o.Data = volume.OpRead, make([]byte, o.Len)
		s.do(o, func(k status.Kind) {
			if k == status.OK {
				c.read(at, o.Data)
			}
			s.goOn(k)
		})
	case k < 17:
		id := uint64(0)
		if o.Kind = volume.OpZero; k < 15 {
			w.load.value++
			id = w.load.value
			o.Kind, o.Data = volume.OpWrite, make([]byte, o.Len)
			fill(o.Data, id)
		}
		c.wrote(at, id, false)
		s.do(o, func(k status.Kind) {
			if k == status.OK {
				c.wrote(at, id, true)
			}
			s.goOn(k)
		})
	case k == 17 && !s.copied && s.left > 5:
		s.flatten()
	default:
		s.flush(func() { s.goOn(status.OK) })
	}
}

func (s *cloneSession) flush(then func()) {
	s.do(&volume.Op{Kind: volume.OpFlush}, func(k status.Kind) {
		if k != status.OK {
			s.goOn(k)
			return
		}
		s.c.flushed()
		then()
	})
}

// flatten copies what the clone shows from its origin, flushes, and lets go of the
// origin, as chunk/gateway does.
func (s *cloneSession) flatten() {
	chunks := s.a.e.OriginChunks()
	left, bad := len(chunks), status.OK // before the first is done: it may be answered at once
	for _, i := range chunks {
		s.do(&volume.Op{Kind: volume.OpCopy, Off: uint64(i) * chunkBytes, Len: chunkBytes}, func(k status.Kind) {
			if k != status.OK {
				bad = k
			}
			if left--; left > 0 || s.over {
				return
			}
			if bad != status.OK {
				s.goOn(bad)
				return
			}
			s.flush(s.letGo)
		})
	}
	if left == 0 {
		s.goOn(status.OK)
	}
}

func (s *cloneSession) letGo() {
	s.copied = true
	op := &pb.FlattenVolume{VolumeId: uint64(s.a.id), Epoch: s.a.epoch}
	s.a.g.agent.do(&pb.Command{Op: &pb.Command_FlattenVolume{FlattenVolume: op}}, func(_ *pb.Result, err error) {
		if s.over {
			return
		}
		if err == nil {
			s.a.refresh()
		}
		s.goOn(status.OK)
	})
}

// goOn is after an answer: a session that is answered with an error ends.
func (s *cloneSession) goOn(k status.Kind) {
	if k != status.OK && k != status.NoSpace {
		s.end()
		return
	}
	if !s.over {
		s.a.g.later(s.c.w.span(ms, 60*ms), s.next)
	}
}

// do submits one operation.
func (s *cloneSession) do(o *volume.Op, then func(status.Kind)) {
	o.User = then
	s.a.step(&volume.Submit{Ops: []*volume.Op{o}})
}

// done takes an answer.
func (s *cloneSession) done(d volume.Done) {
	w := s.c.w
	w.note(s.a.g.name, "clone", func() string {
		return fmt.Sprintf("%s: %d at block %d: %s", s.c.name, d.Op.Kind, d.Op.Off/ids.BlockSize, d.Status)
	}, uint64(d.Op.Kind), d.Op.Off, uint64(d.Status))
	if s.over || s.a.dead {
		return
	}
	if d.Status == status.OK {
		w.stats.CloneOps++
	}
	d.Op.User.(func(status.Kind))(d.Status)
}

// end gives the session up. What it has begun may still happen until the next one
// serves.
func (s *cloneSession) end() {
	if s.over {
		return
	}
	s.over = true
	if s.c.session == s {
		s.c.session = nil
	}
	if s.a != nil {
		s.a.g.sides = slices.DeleteFunc(s.a.g.sides, func(a *attachment) bool { return a == s.a })
		s.a.close()
	}
}

// clone makes a clone of a snapshot that is known whole.
func (b *controller) clone(s *snapshot) {
	w := b.w
	b.taken++
	c := newClone(w, fmt.Sprintf("c%d", b.taken), s)
	w.clones = append(w.clones, c)
	w.note("operator", "clone", func() string { return c.name + " of " + s.name })
	b.ask(&pb.Command{Op: &pb.Command_CloneVolume{CloneVolume: &pb.CloneVolume{Volume: volumeName, Snapshot: s.name, Name: c.name}}}, func(err error) {
		if err != nil {
			c.gone = true
			return
		}
		w.stats.Clones++
		b.use(c)
	})
}

// use has somebody use a clone for a while.
func (b *controller) use(c *clone) {
	w := b.w
	if g := w.gates[w.rng.IntN(len(w.gates))]; c.made && !c.gone && c.session == nil && g.up && g.pausedUntil <= w.now {
		c.open(g, w.chance(4))
	}
}

// drop deletes a clone nobody uses.
func (b *controller) drop(c *clone) {
	if c.session != nil || !c.made {
		return
	}
	c.gone = true
	b.w.note("operator", "delete clone", func() string { return c.name })
	b.ask(&pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: c.name}}}, func(err error) { c.gone = err == nil })
}

// cloned finds a clone by name.
func (w *world) cloned(name string) *clone {
	return w.clones[slices.IndexFunc(w.clones, func(c *clone) bool { return c.name == name })]
}

// livingClones lists the clones there are.
func (w *world) livingClones() (out []*clone) {
	for _, c := range w.clones {
		if c.made && !c.gone {
			out = append(out, c)
		}
	}
	return out
}

// clonesRead reads every clone once more.
func (w *world) clonesRead() {
	for _, c := range w.livingClones() {
		if w.failed != nil {
			return
		}
		if c.session != nil {
			c.session.end() // one that has waited for its attach until now: two at a time would fence each other
		}
		ops := w.stats.CloneOps
		for tries := 0; tries < 3 && w.failed == nil && w.stats.CloneOps < ops+len(windows); tries++ { // a failed disk may end its host once more
			w.converge("to read a clone")
			if a := w.boss.serving(); a != nil && w.failed == nil {
				s := c.open(a.g, true)
				w.runUntil(w.now+healWithin, func() bool { return s.over })
			}
		}
		if w.failed == nil && w.stats.CloneOps < ops+len(windows) {
			w.violate("P7", "clone %s of a healthy cluster cannot be read: %s", c.name, w.picture())
		}
	}
}
