package sim

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// checker holds the promises against what happens, after every step.
type checker struct {
	w         *world
	order     []*register    // by key
	place     map[uint64]int // of a register in order
	snaps     []*snapshot
	wanted    []*snapshot       // held, and not named
	undone    []pair            // writes without an answer, not fenced
	uncovered []*value          // answered and not known durable, by answer
	returned  epochs            // attaches that metadata has answered
	served    epochs            // attaches that have served
	results   map[string][]byte // first result of each (session, seq)
	revision  uint64
}

// epochs are writer epochs with the time something was first true of each.
type epochs []struct {
	epoch uint32
	at    uint64
}

func (es *epochs) add(epoch uint32, now uint64) {
	for _, e := range *es {
		if e.epoch == epoch {
			return
		}
	}
	*es = append(*es, struct {
		epoch uint32
		at    uint64
	}{epoch, now})
}

// after returns an epoch above the given one that it was true of before t, or 0.
func (es epochs) after(epoch uint32, t uint64) uint32 {
	for _, e := range es {
		if e.epoch > epoch && e.at < t {
			return e.epoch
		}
	}
	return 0
}

type pair struct {
	r *register
	v *value
}

func newChecker(w *world) *checker {
	c := &checker{w: w, place: map[uint64]int{}, results: map[string][]byte{}}
	for _, win := range windows {
		eachIn(win.first*ids.BlockSize, win.count*ids.BlockSize, func(key, _, _ uint64) {
			c.place[key] = len(c.order)
			c.order = append(c.order, &register{key: key, vals: []*value{{deadline: never, covered: true}}})
		})
	}
	return c
}

func (c *checker) register(key uint64) *register { return c.order[c.place[key]] }

// each calls f for the registers of an operation, with their bytes in its data.
func (c *checker) each(o *op, f func(r *register, from, to uint64)) {
	eachIn(o.Off, o.Len, func(key, from, to uint64) { f(c.register(key), from, to) })
}

// eachIn calls f for the registers of a range of the volume, by key, and where in
// the range their bytes are.
func eachIn(off, length uint64, f func(key, from, to uint64)) {
	for at := uint64(0); at < length; {
		n := uint64(sectorBytes)
		if !inParts((off + at) / ids.BlockSize) {
			n = ids.BlockSize
		}
		f((off+at)/sectorBytes, at, at+n)
		at += n
	}
}

func inParts(block uint64) bool {
	for _, w := range windows {
		if block >= w.first && block < w.first+w.count {
			return w.parts
		}
	}
	return false
}

// write enters a write or zeroing as invoked, and fills its data.
func (c *checker) write(o *op) {
	c.each(o, func(r *register, from, to uint64) {
		v := &value{epoch: o.c.a.epoch, inv: o.inv}
		if o.Kind == volume.OpWrite {
			c.w.load.value++
			v.id = c.w.load.value
			fill(o.Data[from:to], v.id)
		}
		r.begin(v)
		o.vals = append(o.vals, v)
		c.undone = append(c.undone, pair{r, v})
	})
}

// answered checks an answer.
func (c *checker) answered(o *op, k status.Kind) {
	now := c.w.tick()
	if k != status.OK {
		c.refused(o, k)
		return
	}
	c.w.stats.Ops++
	// Reads under a lease end with it, before metadata answers the next attach;
	// writes, and reads that the members confirm, with the seals, before that
	// attach serves.
	over := c.served
	if o.Kind == volume.OpRead {
		if o.c.a.g.now() < o.c.a.lease {
			over = c.returned
		} else {
			c.w.stats.Confirmed++
		}
	}
	if e := over.after(o.c.a.epoch, o.inv); e > 0 {
		c.w.violate("P4", "%s is answered OK though it was invoked after the attach of epoch %d had returned", o, e)
		return
	}
	switch o.Kind {
	case volume.OpRead:
		c.readDone(o, now)
	case volume.OpFlush:
		c.flushed(o.inv)
	default:
		c.writeDone(o, now)
	}
}

// refused checks an answer that is an error.
func (c *checker) refused(o *op, k status.Kind) {
	c.w.stats.Refused++
	switch {
	case (k == status.Shutdown || k == status.Fenced) && (o.c.a.e.State() == volume.Ended || o.c.a.e.State() == volume.Draining):
		c.w.stats.Unknown++
	case k == status.NoSpace && c.w.faults.everFull && o.Kind == volume.OpWrite:
	case (k == status.IO || k == status.Poison || k == status.Corrupt) && c.w.faults.mayPoison():
	case k == status.IO && c.noneWell(o): // P5: wait or EIO
	default:
		c.w.violate("P7", "%s fails: %s", o, k)
	}
}

// noneWell reports whether some chunk of an operation has no in-sync replica that
// could serve its gateway now, and could while the operation went on. A disk that
// failed may be back before its error has come to the client, most of all when the
// gateway slept meanwhile.
func (c *checker) noneWell(o *op) bool {
	since := max(o.at, c.w.now-backWithin)
	if o.c.a.g.awakeAt >= since {
		since = o.at
	}
	for _, ch := range c.w.meta.chunks() {
		first := uint64(ch.Index) * chunkBytes
		if o.Off >= first+chunkBytes || o.Off+o.Len <= first {
			continue
		}
		if !slices.ContainsFunc(c.w.nodes, func(n *node) bool {
			return holds(ch, n) && c.serves(o.c.a.g, n) && since > n.failedUntil
		}) {
			return true
		}
	}
	return false
}

// backWithin is how long a gateway may take to find a store that is back.
const backWithin = 500 * time.Millisecond

// serves reports whether a store is in sync and could answer a gateway now.
func (c *checker) serves(g *gateway, n *node) bool {
	m, p := c.w.meta.member(n), g.paths[n.index]
	return m != nil && m.InSync && n.up() && n.store.Usage().State == "ok" && n.lostAt == 0 &&
		max(n.pausedUntil, n.disk.hungUntil, p.toServer, p.toClient) <= c.w.now
}

// holds reports whether a node has a replica of a chunk.
func holds(ch *pb.Chunk, n *node) bool {
	return slices.ContainsFunc(ch.Stores, func(id []byte) bool { return bytes.Equal(id, n.id[:]) })
}

func (c *checker) readDone(o *op, now uint64) {
	c.each(o, func(r *register, from, to uint64) {
		if o.States != nil && o.States[from/ids.BlockSize] == volume.BlockData || o.inv < r.since { // a hole reads as zeros
			return
		}
		id, whole := decode(o.Data[from:to])
		if !whole {
			c.w.violate("P1", "%s finds a torn block %d", o, r.key/sectors)
			return
		}
		if why := r.readValue(id, o.inv, now); why != "" {
			c.w.violate("P1", "%s: %s\n  %s", o, why, r)
		}
	})
}

func (c *checker) writeDone(o *op, now uint64) {
	i := 0
	c.each(o, func(r *register, _, _ uint64) {
		v := o.vals[i]
		i++
		if u := r.answered(v, now); u != nil {
			c.w.violate("P1", "%s: value %d and value %d are each partly before the other\n  %s", o, v.id, u.id, r)
		}
		c.uncovered = append(c.uncovered, v)
		if o.FUA {
			v.covered = true
		}
	})
	if o.FUA {
		c.flushed(o.inv)
	}
}

// flushed: everything answered before a flush was invoked is durable.
func (c *checker) flushed(inv uint64) {
	c.cover(inv)
	defer c.w.faults.flushed()
	for _, nd := range c.w.nodes {
		if m := c.w.meta.member(nd); m != nil && m.InSync && nd.lostAt < inv && nd.up() { // one that is dark was not asked: there was nothing to flush
			nd.joined(m)
		}
	}
}

// cover notes that what was answered before a moment is durable.
func (c *checker) cover(inv uint64) {
	n := 0
	for n < len(c.uncovered) && c.uncovered[n].done < inv {
		c.uncovered[n].covered = true
		n++
	}
	c.uncovered = c.uncovered[n:]
}

// attachReturned: from now on older epochs answer no new read by their leases.
func (c *checker) attachReturned(epoch uint32) {
	c.returned.add(epoch, c.w.tick())
}

// serving: older sessions have done all they will ever do, and everything in
// sync is equal and durable.
func (c *checker) serving(a *attachment) {
	now := c.w.tick()
	c.w.note(a.g.name, "serving", func() string { return fmt.Sprintf("epoch %d", a.epoch) }, uint64(a.epoch))
	c.served.add(a.epoch, now)
	c.undone = slices.DeleteFunc(c.undone, func(p pair) bool {
		if p.v.done != never {
			return true
		}
		if p.v.epoch >= a.epoch {
			return false
		}
		if u := p.r.fence(p.v, now); u != nil {
			c.w.violate("P1", "a write of a fenced session: value %d and value %d are each partly before the other\n  %s", p.v.id, u.id, p.r)
		}
		return true
	})
	for _, n := range c.w.nodes {
		if m := c.w.meta.member(n); m != nil && m.InSync {
			n.joined(m)
		}
	}
	c.w.after(time.Millisecond, c.below)
}

// stepped runs after every step of an engine: one that has ended stays so (P4).
func (c *checker) stepped(a *attachment) {
	state := a.e.State()
	if a.ended && state != volume.Ended {
		c.w.violate("P4", "%s has ended in epoch %d, and is %s again", a.g.name, a.epoch, state)
	}
	a.ended = state == volume.Ended
}

// below compares the in-sync members the serving engine reaches: what is not
// above its floor is the same on all.
func (c *checker) below() {
	a := c.w.boss.serving()
	if a == nil || c.w.failed != nil {
		return
	}
	floor := a.e.Info().Floor
	for _, ch := range c.w.meta.chunks() {
		var first *node
		var want []map[ids.Block]wire.Entry
		for _, n := range c.w.nodes {
			if !holds(ch, n) || n.disk.hungUntil > c.w.now || !c.serves(a.g, n) {
				continue
			}
			rep := n.ask(a, &wire.Request{Kind: wire.List, Volume: a.id, Chunk: ids.ChunkID(ch.Id), Epoch: ids.Epoch(a.epoch), Count: chunkBlocks})
			if rep.Status != status.OK {
				continue // it has just been lost
			}
			got := c.seen(rep.Entries)
			if first == nil {
				first, want = n, got
				continue
			}
			if why := c.differ(want, got, floor); why != "" {
				c.w.violate("P1", "chunk %d on %s and %s, and the floor is %s: %s", ch.Index, first.name, n.name, floor, why)
				return
			}
		}
	}
}

// asked notes what an engine asks of metadata.
func (c *checker) asked(a *attachment, m *volume.MetaCall) {
	c.w.note(a.g.name, "asks", func() string {
		return fmt.Sprintf("epoch %d: %v%v%v%v", a.epoch, m.Allocate, m.Change, m.Move, m.Detach)
	}, uint64(a.epoch))
	if m.Change != nil {
		for _, ch := range m.Change.Changes {
			c.lastGood(ch)
		}
	}
}

// darkTime is how long a machine may be without power before an exclusion must
// not count on it any more: it cannot have answered within the engine's bound.
const darkTime = 400 * time.Millisecond

// lastGood checks that no exclusion is asked for of a copy that has everything,
// when those that stay have been without power for a while (P3, P5).
func (c *checker) lastGood(m *pb.MemberChange) {
	out := func(n *node) bool {
		return slices.ContainsFunc(m.Exclude, func(id []byte) bool { return bytes.Equal(id, n.id[:]) })
	}
	for _, ch := range c.w.meta.chunks() {
		good, stay, dark := "", 0, 0
		for _, n := range c.w.nodes {
			mem := c.w.meta.member(n)
			switch {
			case mem == nil || !mem.InSync || !holds(ch, n):
			case out(n):
				if n.lostAt == 0 {
					good = n.name
				}
			default:
				stay++
				if !n.up() && n.lostAt != 0 && c.w.now-n.darkSince > darkTime {
					dark++
				}
			}
		}
		if good != "" && stay > 0 && dark == stay {
			c.w.violate("P3", "%s, which has all of chunk %d, is to be excluded while those that stay have no power", good, ch.Index)
			return
		}
	}
}

// powerLost looks whether what was not flushed may be gone: a chunk all of
// whose in-sync replicas have lost power, or their disk, since.
func (c *checker) powerLost() {
	v := c.w.meta.volume()
	if v == nil {
		return
	}
	now, readers := c.w.tick(), never
	for _, cl := range c.w.load.clients {
		for _, o := range cl.live {
			if o.Kind == volume.OpRead {
				readers = min(readers, o.inv)
			}
		}
	}
	for _, ch := range c.w.meta.chunks() {
		whole := false
		for _, n := range c.w.nodes {
			m := c.w.meta.member(n)
			whole = whole || holds(ch, n) && m != nil && m.InSync && n.lostAt == 0
		}
		if !whole {
			c.shake(ch.Index, now, readers)
		}
	}
}

func (c *checker) shake(chunk uint32, now, readers uint64) {
	c.w.stats.Shakes++
	c.w.note("checker", "shake", func() string { return fmt.Sprintf("chunk %d may lose what was not flushed", chunk) }, uint64(chunk))
	for _, r := range c.order {
		if r.key/sectors/chunkBlocks != uint64(chunk) {
			continue
		}
		r.shake(now, readers)
		for _, v := range r.vals {
			if !v.live { // perhaps done, by when a session serves again
				v.epoch = 0
				c.undone = append(c.undone, pair{r, v})
			}
		}
	}
}

// committed checks P8: a number is done once, whatever is asked again.
func (c *checker) committed(cmd *pb.Command, res *pb.Result) {
	if cmd.GetOpenSession() != nil || status.Kind(res.Status) == status.Expired || cmd.Op == nil {
		return
	}
	k := fmt.Sprintf("%s %d", cmd.Session, cmd.Seq)
	old, ok := c.results[k]
	kept := proto.Clone(res).(*pb.Result)
	if cmd.GetAttach() != nil && res.Volume != nil { // asked again it answers them as they are, until its epoch is over
		kept.Chunks, kept.Volume = nil, &pb.Volume{Id: res.Volume.Id, Epoch: res.Volume.Epoch}
	}
	if ok && cmd.GetAttach() != nil && status.Kind(res.Status) == status.Fenced {
		return
	}
	if cmd.GetHandOver() != nil {
		kept.Chunks = nil
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(kept)
	if err != nil {
		c.w.violate("sim", "a result cannot be encoded: %v", err)
		return
	}
	if ok && !bytes.Equal(old, b) {
		c.w.violate("P8", "command %s has two results", k)
	}
	if !ok && res.Status == 0 {
		c.layersChanged(cmd)
	}
	c.results[k] = b
	if ch := cmd.GetChangeMembers(); ch != nil && slices.ContainsFunc(ch.Changes, func(m *pb.MemberChange) bool { return len(m.Add) > 0 }) {
		c.w.after(0, c.below)
	}
	if mv := cmd.GetMoveChunks(); mv != nil {
		for _, m := range mv.Moves {
			if res.Status == 0 && m.Step == pb.ChunkMove_DONE && len(m.To) > 0 {
				c.w.stats.Moves++
			}
		}
		c.w.after(0, c.below)
	}
	if cmd.GetChangeMembers() != nil || cmd.GetRegisterStore() != nil || cmd.GetMoveChunks() != nil {
		c.membersChanged()
	}
}

// membersChanged checks P5: a serving volume keeps an in-sync copy of each
// chunk.
func (c *checker) membersChanged() {
	if v := c.w.meta.volume(); v == nil || v.Revision == c.revision {
		return
	} else {
		c.revision = v.Revision
	}
	for _, ch := range c.w.meta.chunks() {
		held := false
		for _, n := range c.w.nodes {
			m := c.w.meta.member(n)
			held = held || m != nil && m.InSync && holds(ch, n)
		}
		if !held {
			c.w.violate("P5", "chunk %d has no in-sync replica any more: %s", ch.Index, c.w.meta.picture())
		}
	}
	c.powerLost()
}

// allRead reads every register once more.
func (c *checker) allRead() {
	if c.w.failed != nil {
		return
	}
	a := c.w.boss.serving()
	if a == nil {
		c.w.violate("converge", "nobody serves: %s", c.w.picture())
		return
	}
	var ops []*op
	for _, win := range windows {
		ops = append(ops, a.client.submit(&volume.Op{Kind: volume.OpRead, Off: win.first * ids.BlockSize, Len: win.count * ids.BlockSize}, false))
	}
	for _, o := range ops {
		if !c.w.runUntil(c.w.now+30*time.Second, func() bool { return o.over }) {
			c.w.violate("P7", "%s of a healthy cluster is not answered: %s", o, c.w.picture())
			return
		}
	}
}

// equal compares what the in-sync members hold, block by block.
func (c *checker) equal() {
	if c.w.failed != nil || !c.w.load.flushed() {
		return
	}
	c.w.converge("flushed") // a member may just have been lost
	a := c.w.boss.serving()
	if c.w.failed != nil || a == nil {
		return
	}
	for _, ch := range c.w.meta.chunks() {
		var first *node
		var want []map[ids.Block]wire.Entry
		for _, n := range c.w.nodes {
			if !holds(ch, n) || !n.up() {
				continue
			}
			rep := n.ask(a, &wire.Request{Kind: wire.List, Volume: a.id, Chunk: ids.ChunkID(ch.Id), Epoch: ids.Epoch(a.epoch), Count: chunkBlocks})
			if rep.Status != status.OK {
				c.w.violate("P5", "%s cannot list chunk %d: %s", n.name, ch.Index, rep.Detail)
				return
			}
			got := c.seen(rep.Entries)
			if first == nil {
				first, want = n, got
			} else if why := c.differ(want, got, ids.Version(never)); why != "" {
				c.w.violate("P1", "chunk %d differs between %s and %s: %s", ch.Index, first.name, n.name, why)
				return
			}
		}
	}
}

// same reports whether two replicas have the same at a block. A write whose only
// copy rots before anybody else has it is poison on the others, and still looks
// like data on that one.
func (c *checker) same(x, y wire.Entry) bool {
	poison := x.Kind == wire.EntryPoison || y.Kind == wire.EntryPoison
	if x.Layer != y.Layer { // given to another one on one of them: the checksum names the layer
		x.Layer, x.Sum = y.Layer, y.Sum
	}
	return x == y || poison && c.w.faults.mayPoison() && x.Block == y.Block && x.Version == y.Version
}

// seen is what the volume, and each of its snapshots, shows of a store's entries.
func (c *checker) seen(es []wire.Entry) (out []map[ids.Block]wire.Entry) {
	v := c.w.meta.volume()
	heads := []ids.LayerID{ids.LayerID(v.Top)}
	for _, l := range v.Layers {
		if l.State == pb.LayerState_LAYER_STATE_SNAPSHOT {
			heads = append(heads, ids.LayerID(l.Id))
		}
	}
	for _, h := range heads {
		head := h
		_, chain, _ := volume.Between(v.Layers, ids.LayerID(v.Top), nil, head)
		m := map[ids.Block]wire.Entry{}
		for _, en := range es {
			old, has := m[en.Block]
			if at := slices.Index(chain, en.Layer); at >= 0 && (!has || at < slices.Index(chain, old.Layer)) {
				m[en.Block] = en
			}
		}
		out = append(out, m)
	}
	return out
}

// differ says how what two stores show differs, up to a version; "": it does not.
func (c *checker) differ(want, got []map[ids.Block]wire.Entry, upto ids.Version) string {
	for i := range want {
		for b := range ids.Block(chunkBlocks) {
			if x, y := want[i][b], got[i][b]; !c.same(x, y) && max(x.Version, y.Version) <= upto {
				return fmt.Sprintf("block %d, seen from layer %d of %d, is %s (%d, layer %d) on the first and %s (%d, layer %d) on the second", b, i, len(want), x.Version, x.Kind, x.Layer, y.Version, y.Kind, y.Layer)
			}
		}
	}
	return ""
}

// followers applies the log to another copy of the state machine, in batches as
// a follower does: all copies are equal.
func (c *checker) followers() {
	kv := state.NewMem()
	log := c.w.meta.log
	for len(log) > 0 {
		n := min(1+c.w.rng.IntN(7), len(log))
		o := state.NewOverlay(kv)
		for _, cmd := range log[:n] {
			state.Apply(o, proto.Clone(cmd).(*pb.Command))
		}
		err := o.Changes(func(k, v []byte) error {
			if v == nil {
				kv.Delete(k)
			} else {
				kv.Set(k, v)
			}
			return nil
		})
		if err != nil {
			c.w.violate("sim", "a follower cannot apply: %v", err)
		}
		log = log[n:]
	}
	if state.HashAll(kv) != c.w.meta.hash() {
		c.w.violate("P8", "a follower that applied the same log has another state")
	}
}
