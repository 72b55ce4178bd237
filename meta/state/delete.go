package state

import (
	"fmt"
	"strings"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A deleted volume keeps its id, its chunks and its copies, which are repaired
// like any others, but has no name, until its time is over or somebody purges
// it. Then its chunks go, a bounded number with each Housekeeping, and at last
// the volume itself; stores learn that by asking which ids are gone.

const (
	purgeChunks  = 2048                   // removed by one command
	maxKeepNs    = int64(366*86400) * 1e9 // of a deleted volume, or of a shrink's undo
	dueAtOnceNs  = int64(1)
	wasteAnswers = 1024 // copies named in one answer
)

// DeletedVolumes returns what can be had back, by id.
func DeletedVolumes(kv KV) []*pb.Volume {
	return volumesThat(kv, func(v *pb.Volume) bool { return v.DeletedUnixNs > 0 })
}

func volumesThat(kv KV, ok func(*pb.Volume) bool) (out []*pb.Volume) {
	kv.Scan(key(tVolume), nil, func(_, b []byte) bool {
		v := &pb.Volume{}
		decode(b, v)
		if ok(v) {
			out = append(out, v)
		}
		return true
	})
	return out
}

func keepNs(seconds int64) (int64, error) {
	if seconds < 0 || seconds > maxKeepNs/1e9 {
		return 0, status.Errorf(status.Invalid, "keeping for %d seconds is not possible: 0 to a year", seconds)
	}
	return seconds * 1e9, nil
}

// used names what a volume is needed for.
func (a *apply) used(v *pb.Volume) error {
	endMaintenance(v)
	if v.HolderSession != "" {
		return status.Errorf(status.Held, "volume %s is attached on host %s: detach it first", v.Name, v.HolderHost)
	}
	for _, vm := range VMs(a.kv) {
		for _, disk := range append([]string{vm.Volume}, vm.Disks...) {
			if disk == v.Name {
				return status.Errorf(status.Held, "volume %s is a disk of VM %s: remove the VM first", v.Name, vm.Name)
			}
		}
	}
	return nil
}

func (a *apply) deleteVolume(op *pb.DeleteVolume) (*pb.Result, error) {
	v, err := a.find(op.Volume)
	if err != nil {
		return nil, err
	}
	if err := a.used(v); err != nil {
		return nil, err
	}
	if err := a.checkNoClones(v); err != nil {
		return nil, err
	}
	keep, err := keepNs(op.KeepSeconds)
	if err != nil {
		return nil, err
	}
	a.kv.Delete(key(tName, v.Name))
	v.DeletedUnixNs, v.PurgeUnixNs = max(a.now, 1), max(a.now+keep, 1)
	put(a.kv, key(tVolume, v.Id), v)
	if keep > 0 {
		a.kv.Set(key(tDue, uint64(v.PurgeUnixNs), v.Id), []byte{})
		a.event("volume %s removed: it can be had back until %s as id:%d", v.Name, stamp(v.PurgeUnixNs), v.Id)
		return &pb.Result{Volume: v}, nil
	}
	a.event("volume %s removed", v.Name)
	a.purgeSome(v)
	return &pb.Result{Volume: v}, nil
}

// deleted finds a deleted volume by "id:N", or by the name it had if that is
// clear.
func (a *apply) deleted(name string) (*pb.Volume, error) {
	var id uint64
	if n, err := fmt.Sscanf(name, "id:%d", &id); n == 1 && err == nil {
		if v := VolumeByID(a.kv, id); v != nil && v.DeletedUnixNs > 0 {
			return v, nil
		}
		return nil, status.Errorf(status.NotFound, "there is no deleted volume %s: `cairn volume ls --deleted` lists them", name)
	}
	var found []*pb.Volume
	for _, v := range DeletedVolumes(a.kv) {
		if v.Name == name {
			found = append(found, v)
		}
	}
	switch len(found) {
	case 0:
		return nil, status.Errorf(status.NotFound, "there is no deleted volume %q: `cairn volume ls --deleted` lists them", name)
	case 1:
		return found[0], nil
	}
	var which []string
	for _, v := range found {
		which = append(which, fmt.Sprintf("id:%d (deleted %s)", v.Id, stamp(v.DeletedUnixNs)))
	}
	return nil, status.Errorf(status.Conflict, "%d deleted volumes had the name %s: name one of %s", len(found), name, strings.Join(which, ", "))
}

func (a *apply) undeleteVolume(op *pb.UndeleteVolume) (*pb.Result, error) {
	v, err := a.deleted(op.Volume)
	if err != nil {
		return nil, err
	}
	name := op.Name
	if name == "" {
		name = v.Name
	}
	if !validName(name) {
		return nil, badName("volume", name)
	}
	if a.kv.Get(key(tName, name)) != nil {
		return nil, status.Errorf(status.Exists, "volume %s exists already: bring the deleted one back under another name", name)
	}
	if v.PurgeUnixNs <= a.now {
		return nil, status.Errorf(status.NotFound, "volume %s is being purged since %s: it cannot be had back", v.Name, stamp(v.PurgeUnixNs))
	}
	a.kv.Delete(key(tDue, uint64(v.PurgeUnixNs), v.Id))
	v.Name, v.DeletedUnixNs, v.PurgeUnixNs = name, 0, 0
	a.kv.Set(key(tName, name), put64(v.Id))
	put(a.kv, key(tVolume, v.Id), v)
	a.event("volume %s is back", name)
	return &pb.Result{Volume: v}, nil
}

func (a *apply) purgeVolume(op *pb.PurgeVolume) (*pb.Result, error) {
	v, err := a.deleted(op.Volume)
	if err != nil {
		return nil, err
	}
	a.kv.Delete(key(tDue, uint64(v.PurgeUnixNs), v.Id))
	v.PurgeUnixNs = max(a.now, 1)
	put(a.kv, key(tVolume, v.Id), v)
	a.event("volume %s purged", v.Name)
	a.purgeSome(v)
	return &pb.Result{Volume: v}, nil
}

// purgeSome removes a part of a volume, and the rest of it with the last part;
// until then it stays due.
func (a *apply) purgeSome(v *pb.Volume) {
	var some [][]byte
	a.kv.Scan(key(tChunk, v.Id), nil, func(k, _ []byte) bool {
		some = append(some, append([]byte(nil), k...))
		return len(some) < purgeChunks
	})
	for _, k := range some {
		a.kv.Delete(k)
	}
	if len(some) == purgeChunks {
		v.ChunkCount -= min(v.ChunkCount, purgeChunks)
		put(a.kv, key(tVolume, v.Id), v)
		a.kv.Set(key(tDue, uint64(dueAtOnceNs), v.Id), []byte{})
		return
	}
	a.kv.Delete(key(tDue, uint64(dueAtOnceNs), v.Id))
	a.kv.Delete(key(tDue, uint64(v.PurgeUnixNs), v.Id))
	for _, m := range v.Members {
		a.kv.Delete(key(tUse, m.Store, v.Id))
	}
	a.forgetOrigin(v)
	dropVolume(a.kv, v)
}

// dropVolume forgets a volume.
func dropVolume(kv KV, v *pb.Volume) {
	recount(kv, VolumeByID(kv, v.Id), nil)
	kv.Delete(key(tVolume, v.Id))
}

// NextDue says when Housekeeping has something to do, in Unix time (0: never).
func NextDue(kv KV) (unixNs int64) {
	kv.Scan(key(tDue), nil, func(k, _ []byte) bool {
		unixNs = int64(u64(k[1:]))
		return false
	})
	return unixNs
}

// housekeeping does a bounded part of what is due. It is no client's command:
// it has no number, and doing it twice does the next part.
func (a *apply) housekeeping(op *pb.Housekeeping) (*pb.Result, error) {
	a.raiseFormat(op.Format)
	if op.Audit || op.Format > 0 {
		return &pb.Result{}, nil
	}
	var due []byte
	a.kv.Scan(key(tDue), nil, func(k, _ []byte) bool {
		if int64(u64(k[1:])) <= a.now {
			due = append(due, k...)
		}
		return false
	})
	if due == nil {
		return &pb.Result{}, nil
	}
	v := VolumeByID(a.kv, u64(due[9:]))
	switch {
	case v != nil && v.DeletedUnixNs > 0 && v.PurgeUnixNs <= a.now:
		if len(due) > 0 && u64(due[1:]) != uint64(dueAtOnceNs) {
			a.kv.Delete(due)
			a.event("volume %s, deleted %s, is purged: its time is over", v.Name, stamp(v.DeletedUnixNs))
		}
		a.purgeSome(v)
	case v != nil && v.DeletedUnixNs == 0 && v.ShrunkFrom > 0 && v.UndoUnixNs <= a.now:
		a.cutSome(v, due)
	default: // it came back, or was put off
		a.kv.Delete(due)
	}
	return &pb.Result{}, nil
}
