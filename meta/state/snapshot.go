package state

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// The layers of a volume are a tree; the top is where its writer writes, the
// other living ones are snapshots, or on their way to be one or to be gone:
//
//	open      the top; below it: a snapshot was prepared, and the writer of this
//	          epoch may not have gone over to the new top yet
//	snapshot  named; complete and durable on every member in sync
//	deleted   nobody reads it by itself; its only child still looks through it,
//	          and its blocks are being given to that child
//
// A layer that is open below the top when the epoch ends is nobody's: it becomes
// a deleted one. A deleted layer without children goes at once, and one whose
// blocks all members in sync have given to its child goes by PruneLayer. Nothing
// else takes a layer away, so a layer that is missing here is gone for good.

// maxOrigins bounds clones of clones: a read of an empty block asks so many
// volumes.
const maxOrigins = 16

func layer(v *pb.Volume, id uint32) *pb.Layer {
	for _, l := range v.Layers {
		if l.Id == id {
			return l
		}
	}
	return nil
}

func snapshot(v *pb.Volume, name string) *pb.Layer {
	for _, l := range v.Layers {
		if l.State == pb.LayerState_LAYER_STATE_SNAPSHOT && l.Name == name {
			return l
		}
	}
	return nil
}

// children lists the layers of v right above one.
func children(v *pb.Volume, id uint32) (out []*pb.Layer) {
	for _, l := range v.Layers {
		if l.HasParent && l.Parent == id {
			out = append(out, l)
		}
	}
	return out
}

func noSnapshot(v *pb.Volume, name string) error {
	return status.Errorf(status.NotFound, "volume %s has no snapshot %q: `cairn volume snapshot ls %s` lists them", v.Name, name, v.Name)
}

// materialize writes down the one layer every volume begins with.
func materialize(v *pb.Volume) {
	if len(v.Layers) == 0 {
		v.Layers = []*pb.Layer{{Id: v.Top, State: pb.LayerState_LAYER_STATE_OPEN, CreatedUnixNs: v.CreatedUnixNs}}
	}
}

// grow adds a new top over a layer.
func (a *apply) growLayer(v *pb.Volume, parent uint32) error {
	if len(v.Layers) >= wire.MaxLayers {
		return status.Errorf(status.TooBig, "volume %s has %d layers, the most there can be: delete snapshots, and let their layers be merged", v.Name, len(v.Layers))
	}
	if v.LastLayer == 1<<32-1 {
		return status.Errorf(status.TooBig, "volume %s has used all its layer numbers: copy it to a new volume", v.Name)
	}
	v.LastLayer++
	v.Top = v.LastLayer
	v.Layers = append(v.Layers, &pb.Layer{Id: v.Top, HasParent: true, Parent: parent, State: pb.LayerState_LAYER_STATE_OPEN, CreatedUnixNs: a.now})
	return nil
}

// giveUpOpen deletes open layers but the top: nobody writes to them any more,
// and nobody has said that they are complete.
func giveUpOpen(v *pb.Volume) {
	for _, l := range v.Layers {
		if l.State == pb.LayerState_LAYER_STATE_OPEN && l.Id != v.Top {
			l.State = pb.LayerState_LAYER_STATE_DELETED
		}
	}
	reap(v)
}

// reap takes deleted layers without children away.
func reap(v *pb.Volume) {
	for again := true; again; {
		again = false
		v.Layers = slices.DeleteFunc(v.Layers, func(l *pb.Layer) bool {
			gone := !again && l.State == pb.LayerState_LAYER_STATE_DELETED && len(children(v, l.Id)) == 0
			again = again || gone
			return gone
		})
	}
}

// clonesOf names the clones of a volume, or of one of its layers.
func (a *apply) clonesOf(v *pb.Volume, layer *pb.Layer) (names []string) {
	a.kv.Scan(key(tOrigin, v.Id), nil, func(k, _ []byte) bool {
		if c := VolumeByID(a.kv, u64(k[9:])); c != nil && (layer == nil || c.Origin.GetLayer() == layer.Id) {
			if c.DeletedUnixNs > 0 {
				names = append(names, fmt.Sprintf("%s (deleted: `cairn volume purge id:%d` lets it go)", c.Name, c.Id))
			} else {
				names = append(names, c.Name)
			}
		}
		return true
	})
	return names
}

// listed joins at most a few names.
func listed(names []string) string {
	const most = 8
	if len(names) > most {
		return strings.Join(names[:most], ", ") + ", …"
	}
	return strings.Join(names, ", ")
}

// checkSnapshotsFit refuses to cut off what a snapshot shows.
func checkSnapshotsFit(v *pb.Volume, size uint64) error {
	for _, l := range v.Layers {
		switch {
		case l.State == pb.LayerState_LAYER_STATE_SNAPSHOT && l.SizeBytes > size:
			return status.Errorf(status.Held, "snapshot %s of volume %s has %s: delete it before the volume gets smaller than that", l.Name, v.Name, ids.FormatSize(l.SizeBytes))
		case l.State == pb.LayerState_LAYER_STATE_OPEN && l.Id != v.Top:
			return status.Errorf(status.Conflict, "a snapshot of volume %s is being taken: try again", v.Name)
		}
	}
	return nil
}

// checkNoClones refuses to remove what others still show.
func (a *apply) checkNoClones(v *pb.Volume) error {
	if names := a.clonesOf(v, nil); len(names) > 0 {
		return status.Errorf(status.Held, "volume %s has clones that read from it: %s: flatten or remove them first", v.Name, listed(names))
	}
	return nil
}

// forgetOrigin ends a clone's claim on its origin.
func (a *apply) forgetOrigin(v *pb.Volume) {
	if v.Origin != nil {
		a.kv.Delete(key(tOrigin, v.Origin.VolumeId, v.Id))
		v.Origin = nil
	}
}

func (a *apply) prepareSnapshot(op *pb.PrepareSnapshot) (*pb.Result, error) {
	v, err := a.current(op.VolumeId, op.Epoch)
	if err != nil {
		return nil, err
	}
	materialize(v)
	cur := layer(v, op.Current)
	if cur == nil || cur.State != pb.LayerState_LAYER_STATE_OPEN {
		return nil, status.Errorf(status.Conflict, "layer %d is not one that volume %s is written to (%d is)", op.Current, v.Name, v.Top)
	}
	if top := layer(v, v.Top); v.Top != op.Current {
		if !top.HasParent || top.Parent != op.Current {
			return nil, status.Errorf(status.Conflict, "layer %d of volume %s is not right below its top %d", op.Current, v.Name, v.Top)
		}
		return &pb.Result{Volume: v}, nil // prepared before
	}
	giveUpOpen(v)
	if err := a.growLayer(v, op.Current); err != nil {
		return nil, err
	}
	put(a.kv, key(tVolume, v.Id), v)
	return &pb.Result{Volume: v}, nil
}

// nameSnapshots is the moment a snapshot, or a group of them, exists.
func (a *apply) nameSnapshots(op *pb.NameSnapshots) (*pb.Result, error) {
	if op.GiveUp {
		return a.giveUpCuts(op.Cuts)
	}
	if !validName(op.Name) {
		return nil, badName("snapshot", op.Name)
	}
	if len(op.Cuts) == 0 || len(op.Cuts) > MaxIndices {
		return nil, status.Errorf(status.Invalid, "a snapshot of %d volumes is not possible: 1 to %d", len(op.Cuts), MaxIndices)
	}
	res := &pb.Result{}
	var names []string
	for _, c := range op.Cuts {
		v := VolumeByID(a.kv, c.VolumeId)
		if v == nil {
			return nil, status.Errorf(status.NotFound, "there is no volume with id %d", c.VolumeId)
		}
		l := layer(v, c.Layer)
		switch {
		case snapshot(v, op.Name) != nil:
			return nil, status.Errorf(status.Exists, "volume %s has a snapshot %s already: choose another name", v.Name, op.Name)
		case l == nil || l.Id == v.Top || l.State != pb.LayerState_LAYER_STATE_OPEN:
			return nil, status.Errorf(status.Conflict, "the cut of volume %s at layer %d was given up: take the snapshot again", v.Name, c.Layer)
		case slices.ContainsFunc(res.Volumes, func(o *pb.Volume) bool { return o.Id == v.Id }):
			return nil, status.Errorf(status.Invalid, "volume %s is named twice", v.Name)
		}
		l.State, l.Name, l.CreatedUnixNs, l.SizeBytes = pb.LayerState_LAYER_STATE_SNAPSHOT, op.Name, a.now, c.SizeBytes
		res.Volumes, names = append(res.Volumes, v), append(names, v.Name)
	}
	for _, v := range res.Volumes {
		put(a.kv, key(tVolume, v.Id), v)
	}
	a.event("snapshot %s of %s taken", op.Name, listed(names))
	return res, nil
}

// giveUpCuts lets go of cuts that get no name: their writers have gone over to the
// layer above, so nothing is written to them any more.
func (a *apply) giveUpCuts(cuts []*pb.Cut) (*pb.Result, error) {
	for _, c := range cuts {
		v := VolumeByID(a.kv, c.VolumeId)
		if v == nil {
			continue
		}
		if l := layer(v, c.Layer); l != nil && l.Id != v.Top && l.State == pb.LayerState_LAYER_STATE_OPEN {
			l.State = pb.LayerState_LAYER_STATE_DELETED
			reap(v)
			put(a.kv, key(tVolume, v.Id), v)
		}
	}
	return &pb.Result{}, nil
}

func (a *apply) deleteSnapshot(op *pb.DeleteSnapshot) (*pb.Result, error) {
	v, err := a.find(op.Volume)
	if err != nil {
		return nil, err
	}
	l := snapshot(v, op.Name)
	if l == nil {
		return nil, noSnapshot(v, op.Name)
	}
	if names := a.clonesOf(v, l); len(names) > 0 {
		return nil, status.Errorf(status.Held, "snapshot %s of volume %s has clones that read from it: %s: flatten or remove them first", op.Name, v.Name, listed(names))
	}
	l.State, l.Name = pb.LayerState_LAYER_STATE_DELETED, ""
	reap(v)
	put(a.kv, key(tVolume, v.Id), v)
	a.event("snapshot %s of %s deleted", op.Name, v.Name)
	return &pb.Result{Volume: v}, nil
}

func (a *apply) rollbackVolume(op *pb.RollbackVolume) (*pb.Result, error) {
	v, err := a.find(op.Volume)
	if err != nil {
		return nil, err
	}
	l := snapshot(v, op.Snapshot)
	if l == nil {
		return nil, noSnapshot(v, op.Snapshot)
	}
	endMaintenance(v)
	if v.HolderSession != "" {
		return nil, status.Errorf(status.Held, "volume %s is attached on host %s: detach it first, its user would find its disk changed under it", v.Name, v.HolderHost)
	}
	if v.ShrunkFrom > 0 {
		return nil, status.Errorf(status.Conflict, "volume %s has a shrink that can be undone: undo it or make it final before it is rolled back", v.Name)
	}
	if more := int64(l.SizeBytes) - int64(v.SizeBytes); more > 0 {
		if err := a.checkQuota(v.Tenant, uint64(more), 0); err != nil {
			return nil, err
		}
	}
	if err := a.growLayer(v, l.Id); err != nil {
		return nil, err
	}
	giveUpOpen(v)
	v.SizeBytes = l.SizeBytes
	v.Revision++ // sizes of one revision only grow
	put(a.kv, key(tVolume, v.Id), v)
	a.event("volume %s rolled back to snapshot %s", v.Name, op.Snapshot)
	return &pb.Result{Volume: v}, nil
}

func (a *apply) cloneVolume(op *pb.CloneVolume) (*pb.Result, error) {
	o, err := a.find(op.Volume)
	if err != nil {
		return nil, err
	}
	l := snapshot(o, op.Snapshot)
	if l == nil {
		return nil, noSnapshot(o, op.Snapshot)
	}
	if !validName(op.Name) {
		return nil, badName("volume", op.Name)
	}
	if a.kv.Get(key(tName, op.Name)) != nil {
		return nil, status.Errorf(status.Exists, "volume %s exists already: choose another name", op.Name)
	}
	if n := len(ancestors(a.kv, o)); n+1 >= maxOrigins {
		return nil, status.Errorf(status.TooBig, "volume %s is a clone of a clone, %d times over: flatten it before it is cloned again", o.Name, n)
	}
	if err := a.checkQuota(o.Tenant, l.SizeBytes, 0); err != nil {
		return nil, err
	}
	v := &pb.Volume{Name: op.Name, SizeBytes: l.SizeBytes, ChunkBytes: o.ChunkBytes, Replicas: o.Replicas, Domain: o.Domain, Tenant: o.Tenant,
		CreatedUnixNs: a.now, Revision: 1, Origin: &pb.Origin{VolumeId: o.Id, Layer: l.Id, SizeBytes: l.SizeBytes}}
	v.Id = next(a.kv, "volume")
	put(a.kv, key(tVolume, v.Id), v)
	a.kv.Set(key(tName, v.Name), put64(v.Id))
	a.kv.Set(key(tOrigin, o.Id, v.Id), []byte{})
	a.event("volume %s cloned from snapshot %s of %s", v.Name, op.Snapshot, o.Name)
	return &pb.Result{Volume: v}, nil
}

func (a *apply) flattenVolume(op *pb.FlattenVolume) (*pb.Result, error) {
	v, err := a.current(op.VolumeId, op.Epoch)
	if err != nil {
		return nil, err
	}
	if v.Origin == nil {
		return &pb.Result{Volume: v}, nil
	}
	if err := checkFlat(v); err != nil {
		return nil, err
	}
	a.forgetOrigin(v)
	put(a.kv, key(tVolume, v.Id), v)
	a.event("clone %s has everything itself and lets go of its origin", v.Name)
	return &pb.Result{Volume: v}, nil
}

// checkFlat refuses to cut a clone from its origin while snapshots of the clone
// show through.
func checkFlat(v *pb.Volume) error {
	for _, l := range v.Layers {
		switch {
		case l.State == pb.LayerState_LAYER_STATE_SNAPSHOT:
			return status.Errorf(status.Held, "snapshot %s of clone %s still reads from the clone's origin: delete it first", l.Name, v.Name)
		case l.State == pb.LayerState_LAYER_STATE_OPEN && l.Id != v.Top:
			return status.Errorf(status.Conflict, "a snapshot of clone %s is being taken: try again", v.Name)
		}
	}
	return nil
}

func (a *apply) pruneLayer(op *pb.PruneLayer) (*pb.Result, error) {
	v, err := a.current(op.VolumeId, op.Epoch)
	if err != nil {
		return nil, err
	}
	if v.Revision != op.Revision {
		return nil, conflict(v, op.Revision)
	}
	l := layer(v, op.Layer)
	if l == nil {
		return &pb.Result{Volume: v}, nil // gone already
	}
	ch := children(v, l.Id)
	if l.State != pb.LayerState_LAYER_STATE_DELETED || len(ch) != 1 || len(a.clonesOf(v, l)) > 0 {
		return nil, status.Errorf(status.Conflict, "layer %d of volume %s is needed by itself", op.Layer, v.Name)
	}
	for _, m := range v.Members {
		if !m.InSync {
			return nil, status.Errorf(status.Conflict, "layer %d of volume %s stays until store %x on host %s is in sync", op.Layer, v.Name, m.Store[:4], m.Host)
		}
	}
	ch[0].HasParent, ch[0].Parent = l.HasParent, l.Parent
	v.Layers = slices.DeleteFunc(v.Layers, func(o *pb.Layer) bool { return o == l })
	put(a.kv, key(tVolume, v.Id), v)
	return &pb.Result{Volume: v}, nil
}

// ancestors lists the origins of a volume, nearest first.
func ancestors(kv KV, v *pb.Volume) (out []*pb.Origin) {
	for v != nil && v.Origin != nil {
		out = append(out, v.Origin)
		v = VolumeByID(kv, v.Origin.VolumeId)
	}
	return out
}

// Origins returns what a clone reads through, nearest first, with the chunk maps.
func Origins(kv KV, v *pb.Volume) (out []*pb.OriginState) {
	for _, o := range ancestors(kv, v) {
		out = append(out, &pb.OriginState{Volume: VolumeByID(kv, o.VolumeId), Layer: o.Layer, SizeBytes: o.SizeBytes, Chunks: Chunks(kv, o.VolumeId)})
	}
	return out
}

// LayersOf tells stores which layers these volumes have. A volume that never had
// a snapshot, or is not there, is left out.
func LayersOf(kv KV, volumes []uint64) (out []*pb.VolumeLayers) {
	for _, id := range volumes {
		v := VolumeByID(kv, id)
		if v == nil || len(v.Layers) == 0 {
			continue
		}
		out = append(out, LayerList(v))
	}
	return out
}

// LayerList is a volume's layers as a store has to know them, by id.
func LayerList(v *pb.Volume) *pb.VolumeLayers {
	l := &pb.VolumeLayers{VolumeId: v.Id, Last: v.LastLayer}
	for _, x := range v.Layers {
		ref := &pb.LayerRef{Id: x.Id}
		if ch := children(v, x.Id); x.State == pb.LayerState_LAYER_STATE_DELETED && len(ch) == 1 {
			ref.Merging, ref.Into = true, ch[0].Id
		}
		l.Layers = append(l.Layers, ref)
	}
	slices.SortFunc(l.Layers, func(a, b *pb.LayerRef) int { return int(int64(a.Id) - int64(b.Id)) })
	return l
}
