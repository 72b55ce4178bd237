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
	"github.com/cairnstore/cairn/proto/wire"
)

const ms = time.Millisecond

const (
	maxSnapshots = 3 // that live at a time: disks are small
	cutWait      = 2 * time.Second
	viewLonger   = 2 * time.Second // some views stay open, their snapshot deleted or not
)

// snapshot is what a cut shows, as far as anybody has looked: of each register
// the values it may show, then the one it does.
type snapshot struct {
	name     string
	layer    uint32
	inv, cut uint64 // it shows one moment between these logical times
	shows    []shown
	deleted  bool
	seen     int // registers that somebody has read
}

// shown is one register in a snapshot.
type shown struct {
	era  int      // of the register, at the cut
	ids  []uint64 // values it may show; one, when it was read
	read bool
}

// cutHeld enters a cut: the layer below the new top never changes again, and has
// all that was answered before.
func (c *checker) cutHeld(inv uint64, n volume.CutNews) *snapshot {
	s := &snapshot{layer: uint32(n.Layer), inv: inv, cut: c.w.tick(), shows: make([]shown, len(c.order))}
	for i, r := range c.order {
		s.shows[i] = shown{era: r.era, ids: r.candidates(inv, s.cut)}
		if len(s.shows[i].ids) == 0 {
			c.w.violate("P1", "a snapshot of layer %d can show no value: %s", s.layer, r)
		}
	}
	c.cover(s.cut)
	c.w.after(0, c.w.faults.flushed)
	return s
}

// looked checks one register's bytes in a snapshot.
func (c *checker) looked(s *snapshot, key uint64, b []byte) {
	i := c.place[key]
	r, x := c.order[i], &s.shows[i]
	id, whole := decode(b)
	switch {
	case !whole:
		c.w.violate("P1", "snapshot %s shows a torn block %d", s.name, key/sectors)
	case !slices.Contains(x.ids, id):
		c.w.violate("P1", "snapshot %s of layer %d, cut between %d and %d, shows value %d and not one of %d (read before: %v)\n  %s", s.name, s.layer, s.inv, s.cut, id, x.ids, x.read, r)
	case !x.read:
		if r.era == x.era {
			if why := r.readValue(id, s.inv, s.cut); why != "" {
				c.w.violate("P1", "snapshot %s of layer %d: %s\n  %s", s.name, s.layer, why, r)
			}
			c.oneMoment(s, r, id)
		}
		x.ids, x.read = []uint64{id}, true
		s.seen++
	}
}

// oneMoment narrows when the cut was: behind the invocation of what it shows, and
// before the answer of what was begun when that was known.
func (c *checker) oneMoment(s *snapshot, r *register, id uint64) {
	v := r.only(id)
	if v == nil {
		return
	}
	s.inv = max(s.inv, v.inv)
	for _, u := range r.vals {
		if u != v && u.inv > v.first {
			s.cut = min(s.cut, u.done)
		}
	}
	if s.inv > s.cut {
		c.w.violate("P1", "snapshot %s of layer %d mixes moments: it shows what was begun at %d and not what was answered at %d\n  %s", s.name, s.layer, s.inv, s.cut, r)
	}
}

// rolledBack makes the registers what a snapshot shows.
func (c *checker) rolledBack(s *snapshot) {
	now := c.w.tick()
	c.w.note("checker", "rolled back", func() string { return "to " + s.name }, uint64(s.layer))
	c.undone, c.uncovered = nil, nil
	for i, r := range c.order {
		r.era++
		r.since = now
		r.vals = []*value{{id: s.shows[i].ids[0], inv: now, done: now, deadline: never, first: now, last: now, covered: true}}
	}
}

// layersChanged notes what metadata's log does to snapshots.
func (c *checker) layersChanged(cmd *pb.Command) {
	if nm := cmd.GetNameSnapshots(); nm != nil && !nm.GiveUp {
		at := slices.IndexFunc(c.wanted, func(s *snapshot) bool { return s.name == nm.Name })
		c.snaps = append(c.snaps, c.wanted[at])
		c.wanted = slices.Delete(c.wanted, at, at+1)
		c.w.stats.Snapshots++
	}
	if cl := cmd.GetCloneVolume(); cl != nil {
		c.w.cloned(cl.Name).made = true
	}
	if f := cmd.GetFlattenVolume(); f != nil {
		c.w.cloned(state.VolumeByID(c.w.meta.kv, f.VolumeId).Name).flat = true
		c.w.stats.Flat++
	}
	if d := cmd.GetDeleteSnapshot(); d != nil {
		for _, cl := range c.w.livingClones() {
			if cl.of == c.snapshot(d.Name) && !cl.flat {
				c.w.violate("P8", "snapshot %s is deleted, and clone %s reads from it", d.Name, cl.name)
			}
		}
		c.snapshot(d.Name).deleted = true
		c.w.stats.Deleted++
	}
	if rb := cmd.GetRollbackVolume(); rb != nil {
		c.rolledBack(c.snapshot(rb.Snapshot))
		c.w.stats.Rollbacks++
	}
	if p := cmd.GetPruneLayer(); p != nil {
		c.w.stats.Merged++
	}
}

func (c *checker) snapshot(name string) *snapshot {
	for _, s := range c.snaps {
		if s.name == name {
			return s
		}
	}
	return nil
}

// living lists the snapshots there are.
func (c *checker) living() (out []*snapshot) {
	for _, s := range c.snaps {
		if !s.deleted {
			out = append(out, s)
		}
	}
	return out
}

// allShown reads every snapshot once more, each on another gateway.
func (c *checker) allShown() {
	for i, s := range c.living() {
		whole := false
		for tries := 0; tries < 3 && !whole && c.w.failed == nil; tries++ { // a failed disk may end its host once more
			c.w.converge("to read a snapshot")
			g := c.w.gates[(i+len(c.snaps))%len(c.w.gates)]
			if a := c.w.boss.serving(); a != nil && (!g.up || g.pausedUntil > c.w.now) {
				g = a.g
			}
			if c.w.failed == nil && g.up {
				v := g.show(s, 0)
				c.w.runUntil(c.w.now+healWithin, func() bool { return v.over })
				whole = v.a != nil && v.left == 0
			}
		}
		if c.w.failed == nil && !whole {
			c.w.violate("P7", "snapshot %s of a healthy cluster is not read: %s", s.name, c.w.picture())
		}
		if c.w.failed == nil && s.seen < len(c.order) && !c.w.faults.mayPoison() {
			c.w.violate("P7", "snapshot %s of a healthy cluster cannot be read whole", s.name)
		}
	}
}

// view is a snapshot that a gateway shows, read-only.
type view struct {
	g    *gateway
	s    *snapshot
	a    *attachment
	left int // reads not answered
	over bool
	long time.Duration // it stays open, and is read again, so long
}

// show opens a view, reads all of it, and closes it; some later than at once.
func (g *gateway) show(s *snapshot, long time.Duration) *view {
	v := &view{g: g, s: s, long: long}
	g.views = append(g.views, v)
	g.later(30*time.Second, v.close) // what cannot be read now is given up
	query(g.agent, func(kv state.KV) []*pb.OriginState { return v.states(kv) }, func(states []*pb.OriginState) {
		if v.over {
			return
		}
		if states == nil {
			v.close()
			return
		}
		face := &pb.Volume{Id: states[0].Volume.Id, Name: s.name, SizeBytes: states[0].SizeBytes, ChunkBytes: chunkBytes}
		a := &attachment{g: g, id: ids.VolumeID(face.Id), view: v}
		out := a.takeOut()
		e, err := volume.New(g.now(), volume.Config{Host: g.host, Volume: face, Origins: states, ReadOnly: true}, out)
		if err != nil {
			g.w.violate("P8", "metadata names a snapshot that cannot be: %v", err)
			return
		}
		a.e, v.a = e, a
		a.after(out)
		v.read()
	})
	return v
}

// states is where the snapshot lies, as chunk/gateway asks for it; nil: it is gone.
func (v *view) states(kv state.KV) []*pb.OriginState {
	vol := state.VolumeByName(kv, volumeName)
	for _, l := range vol.Layers {
		if l.State == pb.LayerState_LAYER_STATE_SNAPSHOT && l.Name == v.s.name {
			return append([]*pb.OriginState{{Volume: vol, Layer: l.Id, SizeBytes: l.SizeBytes, Chunks: state.Chunks(kv, vol.Id)}}, state.Origins(kv, vol)...)
		}
	}
	return nil
}

// lookAgain brings where the snapshot lies now, or ends the view.
func (v *view) lookAgain(c *volume.MetaCall) {
	query(v.g.agent, v.states, func(states []*pb.OriginState) {
		if states == nil {
			v.a.step(&volume.Fence{Why: "the snapshot is gone"})
		} else {
			v.a.step(&volume.Origins{States: states, Call: c})
		}
		v.a.step(&volume.MetaDone{Call: c})
	})
}

// read reads every block the load uses.
func (v *view) read() {
	var ops []*volume.Op
	for _, win := range windows {
		for at := uint64(0); at < win.count; at += 16 {
			n := min(16, win.count-at) * ids.BlockSize
			ops = append(ops, &volume.Op{Kind: volume.OpRead, Off: (win.first + at) * ids.BlockSize, Len: n, Data: make([]byte, n)})
		}
	}
	v.left = len(ops)
	for _, o := range ops {
		v.a.step(&volume.Submit{Ops: []*volume.Op{o}})
	}
}

// done takes an answer. A snapshot that is deleted may be read as long as it is
// there, and then not at all: what is answered is right.
func (v *view) done(d volume.Done) {
	w, o := v.g.w, d.Op
	w.note(v.g.name, "shows", func() string {
		return fmt.Sprintf("%s block %d+%d: %s", v.s.name, o.Off/ids.BlockSize, o.Len/ids.BlockSize, d.Status)
	}, o.Off, uint64(d.Status))
	switch {
	case d.Status == status.OK:
		eachIn(o.Off, o.Len, func(key, from, to uint64) { w.check.looked(v.s, key, o.Data[from:to]) })
		w.stats.Shown++
	case v.s.deleted, d.Status == status.Shutdown, d.Status == status.Fenced, d.Status == status.IO && !w.faults.over:
	case (d.Status == status.IO || d.Status == status.Poison || d.Status == status.Corrupt) && w.faults.mayPoison():
	default:
		w.violate("P7", "snapshot %s cannot be read: %s", v.s.name, d.Status)
	}
	if v.left--; v.left > 0 || v.over {
		return
	}
	if v.long <= 0 {
		v.close()
		return
	}
	pause := w.span(ms, v.long+2*ms)
	v.long -= pause
	v.g.later(pause, func() {
		if !v.over {
			v.read()
		}
	})
}

// close ends the view.
func (v *view) close() {
	if v.over {
		return
	}
	v.over = true
	v.g.views = slices.DeleteFunc(v.g.views, func(o *view) bool { return o == v })
	if v.a != nil {
		v.a.close()
	}
}

// ask commits an operator's command that metadata may refuse; then hears of it.
func (b *controller) ask(cmd *pb.Command, then func(error)) {
	b.asked++
	newAgent(b.w, fmt.Sprintf("admin-%d", b.asked), "", func(f func()) { f() }).do(cmd, func(_ *pb.Result, err error) { then(err) })
}

// snapshot cuts the volume, as chunk/gateway does for the command line.
func (b *controller) snapshot() {
	w := b.w
	a := b.serving()
	if a == nil || b.busy() || len(w.check.living()) >= maxSnapshots {
		return
	}
	b.cutter, b.cutting = a, w.now+2*cutWait
	b.taken++
	name := fmt.Sprintf("s%d", b.taken)
	w.note("operator", "snapshot", func() string { return name })
	over := func() { b.cutOver(a) }
	a.settle(over, func() {
		prepare := &pb.PrepareSnapshot{VolumeId: uint64(a.id), Epoch: a.epoch, Current: uint32(a.e.Top())}
		a.g.agent.do(&pb.Command{Op: &pb.Command_PrepareSnapshot{PrepareSnapshot: prepare}}, func(res *pb.Result, err error) {
			if err != nil {
				over()
				return
			}
			a.settle(over, func() { b.cut(a, name, res.Volume) })
		})
	})
}

// busy reports whether a snapshot is being taken.
func (b *controller) busy() bool {
	return b.cutter != nil && !b.cutter.dead && b.cutting > b.w.now
}

func (b *controller) cutOver(a *attachment) {
	if b.cutter == a {
		b.cutter = nil
	}
}

// cut holds, and names what was held.
func (b *controller) cut(a *attachment, name string, prepared *pb.Volume) {
	w := b.w
	inv := w.tick()
	ev := &volume.Cut{Volume: prepared, Until: a.g.now() + cutWait}
	var s *snapshot
	a.cuts[ev] = func(n volume.CutNews) {
		switch n.State {
		case volume.CutHeld:
			s = w.check.cutHeld(inv, n)
			s.name = name
			w.note(a.g.name, "cut", func() string { return fmt.Sprintf("layer %d for %s, between %d and %d", n.Layer, name, s.inv, s.cut) }, uint64(n.Layer))
			a.g.later(w.span(0, 20*ms), func() { a.step(&volume.Release{Cut: ev}) })
		case volume.CutReleased:
			w.check.wanted = append(w.check.wanted, s)
			cuts := []*pb.Cut{{VolumeId: uint64(a.id), Layer: s.layer, SizeBytes: volumeBytes}}
			b.ask(&pb.Command{Op: &pb.Command_NameSnapshots{NameSnapshots: &pb.NameSnapshots{Name: name, Cuts: cuts}}}, func(err error) {
				b.cutOver(a)
				if err != nil {
					b.ask(&pb.Command{Op: &pb.Command_NameSnapshots{NameSnapshots: &pb.NameSnapshots{GiveUp: true, Cuts: cuts}}}, func(error) {})
					return
				}
				b.show(s)
			})
		default:
			b.cutOver(a)
		}
	}
	a.step(ev)
}

// settle flushes what was written so far.
func (a *attachment) settle(vain, then func()) {
	if a.dead || a.e.State() != volume.Serving {
		vain()
		return
	}
	o := a.client.submit(&volume.Op{Kind: volume.OpFlush}, true)
	o.then = func(k status.Kind) {
		if k == status.OK && !a.dead {
			then()
		} else {
			vain()
		}
	}
}

// show looks at a snapshot, on some gateway.
func (b *controller) show(s *snapshot) {
	w := b.w
	if g := w.gates[w.rng.IntN(len(w.gates))]; g.up && g.pausedUntil <= w.now && len(g.views) < 4 {
		long := time.Duration(0)
		if w.chance(4) {
			long = viewLonger
		}
		g.show(s, long)
	}
}

// remove deletes a snapshot.
func (b *controller) remove(s *snapshot) {
	b.w.note("operator", "delete snapshot", func() string { return s.name })
	b.ask(&pb.Command{Op: &pb.Command_DeleteSnapshot{DeleteSnapshot: &pb.DeleteSnapshot{Volume: volumeName, Name: s.name}}}, func(error) {})
}

// rollBack detaches the volume and makes it what a snapshot shows, unless
// somebody attaches it meanwhile.
func (b *controller) rollBack(s *snapshot) {
	w := b.w
	if b.rolling || s.seen < len(s.shows) { // only of what is known whole
		return
	}
	b.rolling = true
	w.note("operator", "roll back", func() string { return "to " + s.name })
	if a := b.serving(); a != nil {
		a.g.detach()
	}
	b.rollWhenFree(s, w.now+5*time.Second)
}

func (b *controller) rollWhenFree(s *snapshot, until time.Duration) {
	w := b.w
	switch {
	case w.now >= until:
		b.rolling = false
	case w.meta.volume().HolderSession != "":
		w.after(20*ms, func() { b.rollWhenFree(s, until) })
	default:
		b.ask(&pb.Command{Op: &pb.Command_RollbackVolume{RollbackVolume: &pb.RollbackVolume{Volume: volumeName, Snapshot: s.name}}},
			func(error) { b.rolling = false })
	}
}

// tellLayers has a store hear which layers its volumes have, as cmd/cairn's sweep
// does; it drops the others.
func (n *node) tellLayers(lists []*pb.VolumeLayers) {
	for _, l := range lists {
		q := &wire.Request{Kind: wire.Layers, Store: n.id, Volume: ids.VolumeID(l.VolumeId), Layer: ids.LayerID(l.Last), Epoch: ids.MaxEpoch, Entries: volume.LayerEntries(l)}
		n.store.Submit([]*wire.Request{q}, sinkFunc(func([]*wire.Reply) {})) // what fails is told again next time
	}
}

// dropGone drops the volumes that metadata has forgotten.
func (n *node) dropGone(gone []uint64) {
	for _, id := range gone {
		q := &wire.Request{Kind: wire.Drop, Store: n.id, Volume: ids.VolumeID(id), Epoch: ids.MaxEpoch}
		n.store.Submit([]*wire.Request{q}, sinkFunc(func([]*wire.Reply) {})) // as above
	}
}

// held lists the volumes the store knows, by rising id.
func (n *node) held() []uint64 {
	var out []uint64
	for id := range n.store.Volumes() {
		out = append(out, uint64(id))
	}
	slices.Sort(out)
	return out
}
