package state

import (
	"bytes"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// MaxMoves bounds the moves of one MoveChunks; maxHandOver the volumes of one
// hand-over beside the first.
const (
	MaxMoves    = 256
	maxHandOver = 64
)

// moveChunks changes where copies are. Each move stands or falls by itself: what
// is impossible, or has happened, leaves its chunk as it is, and the answer says
// how that is. So an unknown outcome is settled by asking again.
func (a *apply) moveChunks(op *pb.MoveChunks) (*pb.Result, error) {
	old, err := a.current(op.VolumeId, op.Epoch)
	if err != nil {
		return nil, err
	}
	if old.Revision != op.Revision {
		return nil, conflict(old, op.Revision)
	}
	if len(op.Moves) == 0 || len(op.Moves) > MaxMoves {
		return nil, status.Errorf(status.Invalid, "%d moves of chunks are not possible: 1 to %d at a time", len(op.Moves), MaxMoves)
	}
	m := &mover{apply: a, v: proto.Clone(old).(*pb.Volume), chunks: map[uint32]*pb.Chunk{}}
	res := &pb.Result{}
	for _, mv := range op.Moves {
		c := m.chunk(mv.Index)
		if c == nil {
			continue
		}
		switch mv.Step {
		case pb.ChunkMove_PLAN:
			m.plan(c, mv)
		case pb.ChunkMove_DONE:
			m.done(c, mv)
		case pb.ChunkMove_CANCEL:
			m.cancel(c, mv.To)
		}
	}
	for _, mv := range op.Moves {
		if c := m.chunks[mv.Index]; c != nil && !slices.Contains(res.Chunks, c) {
			res.Chunks = append(res.Chunks, c)
		}
	}
	if m.planned+m.moved+m.given > 0 {
		m.keep()
	}
	res.Volume = Leaving(m.kv, m.v)
	return res, nil
}

// mover is one MoveChunks being done, on copies.
type mover struct {
	*apply
	v       *pb.Volume
	chunks  map[uint32]*pb.Chunk // looked at
	changed []*pb.Chunk
	left    [][]byte // stores that hold less than before

	planned, moved, given int
}

func (m *mover) chunk(ix uint32) *pb.Chunk {
	c, ok := m.chunks[ix]
	if !ok {
		c = ChunkAt(m.kv, m.v.Id, ix)
		m.chunks[ix] = c
	}
	return c
}

func (m *mover) touch(c *pb.Chunk) {
	if !slices.Contains(m.changed, c) {
		m.changed = append(m.changed, c)
	}
}

func storeAt(list [][]byte, id []byte) int {
	return slices.IndexFunc(list, func(b []byte) bool { return bytes.Equal(b, id) })
}

func fillingAt(c *pb.Chunk, id []byte) int {
	return slices.IndexFunc(c.Filling, func(f *pb.Filling) bool { return bytes.Equal(f.Store, id) })
}

// plan notes that a copy is being made. Two things keep replication sound: the
// store is no out-of-sync member, because in sync is said of a store and not of
// a copy, and its failure domain is its own.
func (m *mover) plan(c *pb.Chunk, mv *pb.ChunkMove) {
	more := 0
	for _, f := range c.Filling {
		if len(f.Replaces) == 0 {
			more++
		} else if bytes.Equal(f.Replaces, mv.From) {
			return
		}
	}
	switch {
	case len(mv.To) == 0 || storeAt(c.Stores, mv.To) >= 0 || fillingAt(c, mv.To) >= 0:
		return
	case len(mv.From) > 0 && storeAt(c.Stores, mv.From) < 0:
		return
	case len(mv.From) == 0 && len(c.Stores)+more >= int(m.v.Replicas):
		return
	}
	if old := member(m.v, mv.To); !m.mayHold(c, mv) || old != nil && !old.InSync {
		return
	}
	if HasWaste(m.kv, mv.To, m.v.Id, c.Id) {
		return // it has an old copy yet to drop, and would drop this one
	}
	m.join(m.v, mv.To)
	c.Filling = append(c.Filling, &pb.Filling{Store: mv.To, Replaces: mv.From, Wish: mv.Wish && FormatOf(m.kv) >= 2})
	m.touch(c)
	m.planned++
}

// mayHold checks the leader's choice.
func (m *mover) mayHold(c *pb.Chunk, mv *pb.ChunkMove) bool {
	s := StoreByID(m.kv, mv.To)
	h := HostByName(m.kv, s.GetHost())
	if s == nil || s.Retired || h == nil || h.Drained {
		return false
	}
	domain := Label(h, m.v.Domain)
	others := slices.DeleteFunc(slices.Clone(c.Stores), func(id []byte) bool { return bytes.Equal(id, mv.From) })
	for _, f := range c.Filling {
		others = append(others, f.Store)
	}
	return !slices.ContainsFunc(others, func(id []byte) bool {
		return Label(HostByName(m.kv, StoreByID(m.kv, id).GetHost()), m.v.Domain) == domain
	})
}

// done lets a filled copy count, in the place of the one it replaces; or gives a
// copy up, when there are more than the volume wants.
func (m *mover) done(c *pb.Chunk, mv *pb.ChunkMove) {
	if len(mv.To) == 0 {
		m.giveUp(c, mv.From)
		return
	}
	i, to := fillingAt(c, mv.To), member(m.v, mv.To)
	s := StoreByID(m.kv, mv.To)
	if i < 0 || !to.GetInSync() || s.GetIncarnation() != mv.ToIncarnation || to.Incarnation != mv.ToIncarnation {
		return
	}
	f := c.Filling[i]
	c.Filling = slices.Delete(c.Filling, i, i+1)
	m.touch(c)
	m.moved++
	switch at := storeAt(c.Stores, f.Replaces); {
	case at >= 0:
		m.leave(c, c.Stores[at])
		c.Stores[at] = mv.To
	case len(c.Stores) < int(m.v.Replicas):
		c.Stores = append(c.Stores, mv.To)
	default: // what it was to replace was given up meanwhile
		m.leave(c, mv.To)
	}
}

// HasWaste reports whether a store has an old copy of a chunk yet to drop.
func HasWaste(kv KV, store []byte, volume, chunk uint64) bool {
	return kv.Get(key(tWaste, store, volume, chunk)) != nil
}

// leave notes that a store has nothing of a chunk any more, and is to drop it.
func (m *mover) leave(c *pb.Chunk, store []byte) {
	m.left = append(m.left, store)
	Waste(m.kv, store, m.v.Id, c.Id)
}

// giveUp takes a copy away, if enough are left and one of them is in sync.
func (m *mover) giveUp(c *pb.Chunk, from []byte) {
	at := storeAt(c.Stores, from)
	if at < 0 || len(c.Stores) <= int(m.v.Replicas) {
		return
	}
	rest := slices.Delete(slices.Clone(c.Stores), at, at+1)
	if !slices.ContainsFunc(rest, func(id []byte) bool { return member(m.v, id).GetInSync() }) {
		return
	}
	m.leave(c, from)
	c.Stores = rest
	m.touch(c)
	m.given++
}

func (m *mover) cancel(c *pb.Chunk, to []byte) {
	if i := fillingAt(c, to); i >= 0 {
		c.Filling = slices.Delete(c.Filling, i, i+1)
		m.leave(c, to)
		m.touch(c)
		m.given++
	}
}

// keep writes what has changed. A store that has nothing of the volume any more
// is no member: nobody waits for it at the next attach.
func (m *mover) keep() {
	for _, c := range m.changed {
		put(m.kv, key(tChunk, m.v.Id, c.Index), c)
	}
	if len(m.left) > 0 {
		used := map[string]bool{}
		for _, c := range Chunks(m.kv, m.v.Id) {
			for _, id := range c.Stores {
				used[string(id)] = true
			}
			for _, f := range c.Filling {
				used[string(f.Store)] = true
			}
		}
		for _, id := range m.left {
			if !used[string(id)] {
				m.v.Members = slices.DeleteFunc(m.v.Members, func(x *pb.Member) bool { return bytes.Equal(x.Store, id) })
				m.kv.Delete(key(tUse, id, m.v.Id))
			}
		}
	}
	m.v.Revision++
	put(m.kv, key(tVolume, m.v.Id), m.v)
	if m.moved+m.given > 0 {
		m.event("volume %s: %d copies moved, %d given up, %d more begun", m.v.Name, m.moved, m.given, m.planned)
	}
}

// setReplicas says how many copies there are to be. The revision rises: an
// allocation placed for the old number is placed anew.
func (a *apply) setReplicas(op *pb.SetReplicas) (*pb.Result, error) {
	v, err := a.find(op.Volume)
	if err != nil {
		return nil, err
	}
	if op.Replicas < 1 || op.Replicas > 5 {
		return nil, status.Errorf(status.Invalid, "%d replicas are not possible: 1 to 5", op.Replicas)
	}
	p := a.pool(v.Domain, v.SizeBytes, op.Replicas)
	if p.domains < int(op.Replicas) {
		return nil, status.Errorf(status.NoSpace, "%d replicas need %d failure domains (%s) with stores and there are %d: add hosts or ask for fewer replicas", op.Replicas, op.Replicas, v.Domain, p.domains)
	}
	if err := p.checkFits(v.SizeBytes, op.Replicas); err != nil {
		return nil, err
	}
	old := proto.Clone(v).(*pb.Volume)
	v.Replicas = op.Replicas
	if err := a.checkMore(old, v); err != nil {
		return nil, err
	}
	a.event("volume %s: %d replicas instead of %d", v.Name, v.Replicas, old.Replicas)
	v.Revision++
	put(a.kv, key(tVolume, v.Id), v)
	return &pb.Result{Volume: v}, nil
}

// handOver gives volumes, and the VM whose disks they are, to another writer at
// the word of this one, who serves nothing of them any more: no lease is left to
// be waited for.
func (a *apply) handOver(op *pb.HandOver) (*pb.Result, error) {
	if op.Host == "" || op.Session == "" || len(op.Host) > maxTextBytes || len(op.Session) > maxTextBytes || len(op.Also) > maxHandOver {
		return nil, status.Errorf(status.Invalid, "a hand-over needs a host and a session, and moves at most %d volumes more", maxHandOver)
	}
	var vs []*pb.Volume
	for _, o := range append([]*pb.HandOver{op}, op.Also...) {
		v, err := a.current(o.VolumeId, o.Epoch)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(vs, func(x *pb.Volume) bool { return x.Id == v.Id }) {
			return nil, status.Errorf(status.Invalid, "volume %s is named twice in a hand-over", v.Name)
		}
		if err := a.nextEpoch(v); err != nil {
			return nil, err
		}
		vs = append(vs, v)
	}
	res := &pb.Result{}
	if op.Bind != nil {
		bound, err := a.switchVM(op)
		if err != nil {
			return nil, err
		}
		res.Vm = bound.Vm
	}
	for _, v := range vs {
		giveUpOpen(v)
		a.event("volume %s handed over from host %s to host %s, epoch %d", v.Name, v.HolderHost, op.Host, v.Epoch)
		v.HolderHost, v.HolderSession, v.AttachedUnixNs, v.Moved, v.Maintenance = op.Host, op.Session, a.now, false, false
		put(a.kv, key(tVolume, v.Id), v)
		res.Volumes = append(res.Volumes, Leaving(a.kv, v))
	}
	res.Volume, res.Chunks = res.Volumes[0], Chunks(a.kv, vs[0].Id)
	return res, nil
}

// switchVM is a hand-over's part about the VM. That somebody changed it meanwhile
// is Invalid and not Conflict: asking again is useless, since a VM's revision only
// rises and the volumes, looked at first, have not gone.
func (a *apply) switchVM(op *pb.HandOver) (*pb.Result, error) {
	if b := op.Bind; b.Host != op.Host || b.GetQueue().GetStep() != StepSwitched {
		return nil, status.Errorf(status.Invalid, "VM %s cannot go to host %q with volumes that go to host %q: this is a fault of the caller", b.Vm, b.Host, op.Host)
	}
	if vm := VMByName(a.kv, op.Bind.Vm); vm != nil && vm.Revision != op.Bind.Revision {
		return nil, status.Errorf(status.Invalid, "VM %s was changed while it moved (revision %d, not %d): it stays", vm.Name, vm.Revision, op.Bind.Revision)
	}
	return a.bind(op.Bind, true)
}

// nextEpoch raises the writer epoch.
func (a *apply) nextEpoch(v *pb.Volume) error {
	if v.Epoch >= ids.MaxEpoch {
		return status.Errorf(status.TooBig, "volume %s has used all %d writer epochs: copy it to a new volume", v.Name, ids.MaxEpoch)
	}
	v.Epoch++
	return nil
}

// Leaving says of each member, in a copy of v, whether its chunks are to go
// elsewhere. It is part of answers, not of the state.
func Leaving(kv KV, v *pb.Volume) *pb.Volume {
	if v == nil {
		return nil
	}
	v = proto.Clone(v).(*pb.Volume)
	for _, m := range v.Members {
		s := StoreByID(kv, m.Store)
		m.Leaving = s.GetRetired() || HostByName(kv, s.GetHost()).GetDrained()
	}
	return v
}

// NeedsCare reports whether a volume has anything for its writer, or a
// maintenance session, to repair: a member out of sync or leaving, or chunks
// with too few copies or too many. O(its chunks) only if its members are well.
func NeedsCare(kv KV, v *pb.Volume) bool {
	for _, m := range Leaving(kv, v).GetMembers() {
		if !m.InSync || m.Leaving {
			return true
		}
	}
	return slices.ContainsFunc(Chunks(kv, v.GetId()), func(c *pb.Chunk) bool {
		return len(c.Stores) != int(v.Replicas) || len(c.Filling) > 0
	})
}

// VolumesAfter returns up to limit volumes with ids above after, by id.
func VolumesAfter(kv KV, after uint64, limit int) []*pb.Volume {
	return all[pb.Volume](kv, key(tVolume), key(tVolume, after+1), limit)
}

// endMaintenance takes a volume from a maintenance session, which never is in
// anybody's way: whatever it commits afterwards is of an old epoch.
func endMaintenance(v *pb.Volume) {
	if v.Maintenance {
		v.Epoch++
		v.HolderHost, v.HolderSession, v.AttachedUnixNs, v.Maintenance = "", "", 0, false
	}
}
