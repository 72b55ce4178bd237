package state

import (
	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A shrink lowers the size and leaves the chunk map as it is: chunks beyond the
// end are members' copies like any others. Undo raises the size again. When its
// time is over, the chunks beyond the end leave the map, and their copies are
// noted as waste, which each store drops when it hears of it. Until then the
// volume cannot grow: what it grew into would hold what was cut.
//
// Where data is cut knowingly the end is a chunk's border, so that nothing of
// it is left in a chunk that stays. Elsewhere the gateway has found only zeros
// beyond the end.

func (a *apply) shrinkVolume(op *pb.ShrinkVolume) (*pb.Result, error) {
	v := VolumeByID(a.kv, op.VolumeId)
	if v == nil || v.DeletedUnixNs > 0 {
		return nil, status.Errorf(status.NotFound, "there is no volume with id %d", op.VolumeId)
	}
	if v.Epoch != op.Epoch {
		return nil, status.Errorf(status.Fenced, "epoch %d of volume %s is over (now %d, held by host %q)", op.Epoch, v.Name, v.Epoch, v.HolderHost)
	}
	if err := checkSize(op.SizeBytes); err != nil {
		return nil, err
	}
	keep, err := keepNs(op.KeepSeconds)
	if err != nil {
		return nil, err
	}
	if op.SizeBytes >= v.SizeBytes {
		return nil, status.Errorf(status.Invalid, "volume %s has %s: that is no shrinking", v.Name, ids.FormatSize(v.SizeBytes))
	}
	if op.DiscardTail && op.SizeBytes%v.ChunkBytes != 0 {
		down := op.SizeBytes / v.ChunkBytes * v.ChunkBytes
		return nil, status.Errorf(status.Invalid, "data is cut off volume %s at the end of a chunk only: shrink it to %dM or %dM", v.Name, down>>20, (down+v.ChunkBytes)>>20)
	}
	if err := checkSnapshotsFit(v, op.SizeBytes); err != nil {
		return nil, err
	}
	from := v.SizeBytes
	v.ShrunkFrom = max(v.ShrunkFrom, v.SizeBytes)
	until := max(a.now+keep, 1)
	if FormatOf(a.kv) >= 4 { // what an earlier shrink has promised stays
		until = max(until, v.UndoUnixNs)
	}
	v.SizeBytes, v.UndoUnixNs = op.SizeBytes, until
	v.Revision++ // news from before it are old now
	put(a.kv, key(tVolume, v.Id), v)
	a.kv.Set(key(tDue, uint64(v.UndoUnixNs), v.Id), []byte{})
	how := "beyond it was nothing"
	if op.DiscardTail {
		how = "what was beyond is cut"
	}
	a.event("volume %s shrunk from %s to %s: %s; undo is possible until %s", v.Name, ids.FormatSize(from), ids.FormatSize(v.SizeBytes), how, stamp(v.UndoUnixNs))
	return &pb.Result{Volume: v}, nil
}

// undoable returns a volume with a shrink that is not over.
func (a *apply) undoable(name string) (*pb.Volume, error) {
	v, err := a.find(name)
	if err != nil {
		return nil, err
	}
	if v.ShrunkFrom == 0 || v.UndoUnixNs <= a.now {
		return nil, status.Errorf(status.NotFound, "volume %s has no shrink that can be undone", v.Name)
	}
	return v, nil
}

func (a *apply) undoShrink(op *pb.UndoShrink) (*pb.Result, error) {
	v, err := a.undoable(op.Volume)
	if err != nil {
		return nil, err
	}
	if op.Forget {
		v.UndoUnixNs = max(a.now, 1)
		a.kv.Set(key(tDue, uint64(v.UndoUnixNs), v.Id), []byte{})
		put(a.kv, key(tVolume, v.Id), v)
		a.event("volume %s: its shrink is final", v.Name)
		return &pb.Result{Volume: v}, nil
	}
	old := proto.Clone(v).(*pb.Volume)
	v.SizeBytes, v.ShrunkFrom, v.UndoUnixNs = v.ShrunkFrom, 0, 0
	if err := a.checkMore(old, v); err != nil {
		return nil, err
	}
	v.Revision++
	put(a.kv, key(tVolume, v.Id), v)
	a.event("volume %s has its %s again", v.Name, ids.FormatSize(v.SizeBytes))
	return &pb.Result{Volume: v}, nil
}

// checkGrow: what was cut must be gone before the volume grows over it.
func (a *apply) checkGrow(v *pb.Volume) error {
	switch {
	case v.ShrunkFrom == 0:
		return nil
	case v.UndoUnixNs > a.now:
		return status.Errorf(status.Conflict, "volume %s was shrunk from %s and that can be undone until %s: `cairn volume undo-shrink %s`, or with --forget to make it final", v.Name, ids.FormatSize(v.ShrunkFrom), stamp(v.UndoUnixNs), v.Name)
	}
	return status.Errorf(status.Unavailable, "the end of volume %s is still being cut off: ask again", v.Name)
}

// cutSome takes a part of the chunks beyond the end out of the map.
func (a *apply) cutSome(v *pb.Volume, due []byte) {
	first := uint32((v.SizeBytes + v.ChunkBytes - 1) / v.ChunkBytes)
	cut := all[pb.Chunk](a.kv, key(tChunk, v.Id), key(tChunk, v.Id, first), purgeChunks)
	for _, c := range cut {
		for _, s := range c.Stores {
			Waste(a.kv, s, v.Id, c.Id)
		}
		for _, f := range c.Filling {
			Waste(a.kv, f.Store, v.Id, c.Id)
		}
		a.kv.Delete(key(tChunk, v.Id, c.Index))
		v.ChunkCount--
	}
	if len(cut) < purgeChunks {
		a.kv.Delete(due)
		v.ShrunkFrom, v.UndoUnixNs = 0, 0
		if v.Origin != nil { // what was cut must not show again from there
			v.Origin.SizeBytes = min(v.Origin.SizeBytes, v.SizeBytes)
		}
		v.Cuts++ // its holder forgets the chunks before it takes a new size
		v.CutUpto = u64(a.kv.Get(key(tMeta, "chunk")))
		v.Revision++
		a.event("volume %s: its shrink to %s is final", v.Name, ids.FormatSize(v.SizeBytes))
	}
	put(a.kv, key(tVolume, v.Id), v)
}

// Waste notes a copy that its store is to drop: of a chunk that no map names
// any more.
func Waste(kv KV, store []byte, volume, chunk uint64) {
	kv.Set(key(tWaste, store, volume, chunk), []byte{})
}

// WasteOf returns copies that a store is to drop, not all if there are many.
func WasteOf(kv KV, store []byte) (out []*pb.ChunkCopy) {
	prefix := key(tWaste, store)
	kv.Scan(prefix, nil, func(k, _ []byte) bool {
		out = append(out, &pb.ChunkCopy{VolumeId: u64(k[17:]), ChunkId: u64(k[25:])})
		return len(out) < wasteAnswers
	})
	return out
}

func (a *apply) dropped(op *pb.DroppedCopies) (*pb.Result, error) {
	if len(op.Store) != len(ids.StoreID{}) || len(op.Copies) > wasteAnswers {
		return nil, status.Errorf(status.Invalid, "a store of 16 bytes and at most %d copies are reported at a time", wasteAnswers)
	}
	for _, c := range op.Copies {
		a.kv.Delete(key(tWaste, op.Store, c.VolumeId, c.ChunkId))
	}
	return &pb.Result{}, nil
}
