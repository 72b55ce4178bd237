package state

import (
	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// What volumes have is counted as they change, in the row of their tenant
// (volumes of nobody: tenant "") and in one row for the pool. put does it for
// every change of a volume, so that no operation can forget to; a test compares
// the rows with a recount.

var poolKey = key(tMeta, "pool")

// charge is what one volume counts for.
type charge struct {
	logical, physical, volumes, deletedLogical uint64 // of its tenant
	thick, thickPlaced, deletedPlaced          uint64 // of the pool
}

func placed(v *pb.Volume) uint64 { return v.ChunkCount * v.ChunkBytes * uint64(v.Replicas) }

func chargeOf(v *pb.Volume) (c charge) {
	if v == nil {
		return c
	}
	c.logical, c.physical, c.volumes = v.SizeBytes, placed(v), 1
	if v.DeletedUnixNs > 0 {
		c.deletedLogical, c.deletedPlaced = c.logical, c.physical
	}
	if v.Thick {
		c.thick, c.thickPlaced = max(v.SizeBytes*uint64(v.Replicas), c.physical), c.physical
	}
	return c
}

// recount moves the rows from what a volume was to what it is; nil: none.
func recount(kv KV, old, v *pb.Volume) {
	was, is := chargeOf(old), chargeOf(v)
	if was == is && old.GetTenant() == v.GetTenant() {
		return
	}
	if old != nil {
		countTenant(kv, old.Tenant, was, charge{})
	}
	if v != nil {
		countTenant(kv, v.Tenant, charge{}, is)
	}
	p := PoolOf(kv)
	p.LogicalBytes += is.logical - was.logical
	p.PlacedBytes += is.physical - was.physical
	p.ThickBytes += is.thick - was.thick
	p.ThickPlacedBytes += is.thickPlaced - was.thickPlaced
	p.DeletedBytes += is.deletedPlaced - was.deletedPlaced
	p.CapacityBytes = 0 // counted when asked
	put(kv, poolKey, p)
}

func countTenant(kv KV, name string, was, is charge) {
	k := key(tTenant, name)
	t := one[pb.Tenant](kv, k)
	if t == nil {
		t = &pb.Tenant{Name: name}
	}
	t.LogicalBytes += is.logical - was.logical
	t.PhysicalBytes += is.physical - was.physical
	t.Volumes += is.volumes - was.volumes
	t.DeletedBytes += is.deletedLogical - was.deletedLogical
	if t.Volumes == 0 && t.LogicalQuotaBytes == 0 && t.PhysicalQuotaBytes == 0 {
		kv.Delete(k)
		return
	}
	put(kv, k, t)
}

// PoolOf returns what is promised and placed, without the capacity.
func PoolOf(kv KV) *pb.Pool {
	p := &pb.Pool{}
	load(kv, poolKey, p)
	return p
}

// capacityKey has the sum of StoreBytes, from state version 5 on.
var capacityKey = key(tMeta, "capacity")

// StoreBytes sums the stores in service, in bytes.
func StoreBytes(kv KV) uint64 {
	if FormatOf(kv) >= 5 {
		return u64(kv.Get(capacityKey))
	}
	return sumStores(kv)
}

func sumStores(kv KV) (n uint64) {
	for _, s := range Stores(kv) {
		n += usable(s)
	}
	return n
}

// usable is what a store counts for; nil: nothing.
func usable(s *pb.Store) uint64 {
	if s.GetRetired() {
		return 0
	}
	return s.GetCapacityBytes()
}

// setStore changes a store; nil: it goes.
func (a *apply) setStore(id []byte, s *pb.Store) {
	k := key(tStore, id)
	if FormatOf(a.kv) >= 5 {
		a.kv.Set(capacityKey, put64(u64(a.kv.Get(capacityKey))-usable(one[pb.Store](a.kv, k))+usable(s)))
	}
	if s == nil {
		a.kv.Delete(k)
		return
	}
	put(a.kv, k, s)
}

// Tenants returns all tenants that have quotas or volumes, by name.
func Tenants(kv KV) []*pb.Tenant { return all[pb.Tenant](kv, key(tTenant), nil, 0) }

func (a *apply) setTenant(op *pb.SetTenant) (*pb.Result, error) {
	if !validName(op.Tenant) {
		return nil, badName("tenant", op.Tenant)
	}
	k := key(tTenant, op.Tenant)
	t := one[pb.Tenant](a.kv, k)
	if t == nil {
		t = &pb.Tenant{Name: op.Tenant}
	}
	t.LogicalQuotaBytes, t.PhysicalQuotaBytes = op.LogicalQuotaBytes, op.PhysicalQuotaBytes
	if t.Volumes == 0 && t.LogicalQuotaBytes == 0 && t.PhysicalQuotaBytes == 0 {
		a.kv.Delete(k)
	} else {
		put(a.kv, k, t)
	}
	a.event("tenant %s: quotas of %s of volumes and %s of chunks (0 B: none)", t.Name, ids.FormatSize(t.LogicalQuotaBytes), ids.FormatSize(t.PhysicalQuotaBytes))
	return &pb.Result{}, nil
}

// checkQuota refuses what a volume would take beyond its tenant's quotas.
func (a *apply) checkQuota(tenant string, moreLogical, morePhysical uint64) error {
	t := one[pb.Tenant](a.kv, key(tTenant, tenant))
	if t == nil {
		return nil
	}
	if q := t.LogicalQuotaBytes; q > 0 && moreLogical > 0 && t.LogicalBytes+moreLogical > q {
		return status.Errorf(status.NoSpace, "tenant %s would have volumes of %s and may have %s (%s of them are deleted and not purged yet): purge or shrink some, or raise the quota with `cairn tenant set`", tenant, ids.FormatSize(t.LogicalBytes+moreLogical), ids.FormatSize(q), ids.FormatSize(t.DeletedBytes))
	}
	if q := t.PhysicalQuotaBytes; q > 0 && morePhysical > 0 && t.PhysicalBytes+morePhysical > q {
		return status.Errorf(status.NoSpace, "tenant %s would take up %s with all copies and may take up %s: remove volumes, or raise the quota with `cairn tenant set`", tenant, ids.FormatSize(t.PhysicalBytes+morePhysical), ids.FormatSize(q))
	}
	return nil
}

// checkThick keeps thick volumes' space free: their sizes, and what thin
// volumes have placed, fit into the stores together. It guards the sum over all
// stores; that it fits on each is the placement's work.
func (a *apply) checkThick(moreThick, moreThin uint64) error {
	p := PoolOf(a.kv)
	if p.ThickBytes+moreThick == 0 {
		return nil
	}
	most := StoreBytes(a.kv)
	if need := p.ThickBytes + moreThick + (p.PlacedBytes - p.ThickPlacedBytes) + moreThin; need > most {
		return status.Errorf(status.NoSpace, "%s would be set aside or placed and the stores have %s: add stores, or remove volumes (thick ones keep %s for themselves, deleted ones have %s until they are purged)", ids.FormatSize(need), ids.FormatSize(most), ids.FormatSize(p.ThickBytes), ids.FormatSize(p.DeletedBytes))
	}
	return nil
}

// checkMore holds what a change of a volume takes up, now or as a promise, to its
// tenant's quotas and to what thick volumes keep. v is as it will be. Before version
// 3 only the sizes were held to a quota.
func (a *apply) checkMore(old, v *pb.Volume) error {
	if FormatOf(a.kv) < 3 {
		return a.checkQuota(v.Tenant, max(old.SizeBytes, v.SizeBytes)-old.SizeBytes, 0)
	}
	was, is := chargeOf(old), chargeOf(v)
	more := func(was, is uint64) uint64 { return max(was, is) - was }
	if err := a.checkQuota(v.Tenant, more(was.logical, is.logical), more(was.physical, is.physical)); err != nil {
		return err
	}
	thick, thin := more(was.thick, is.thick), more(was.physical-was.thickPlaced, is.physical-is.thickPlaced)
	if thick+thin == 0 {
		return nil
	}
	return a.checkThick(thick, thin)
}

// Bounds of what is said about a volume.
const (
	maxTags     = 64
	maxTagBytes = 256
	maxBurstMs  = 60_000
)

func checkTags(tags map[string]string) error {
	if len(tags) > maxTags {
		return status.Errorf(status.TooBig, "a volume can have %d tags, not %d", maxTags, len(tags))
	}
	for k, v := range tags {
		if k == "" || len(k)+len(v) > maxTagBytes {
			return status.Errorf(status.Invalid, "tag %.40q is not possible: a name and a value of together at most %d bytes", k, maxTagBytes)
		}
	}
	return nil
}

func checkQos(q *pb.Qos) error {
	switch {
	case q == nil:
	case q.BurstMs > maxBurstMs:
		return status.Errorf(status.Invalid, "a burst of %d ms is not possible: at most %d", q.BurstMs, maxBurstMs)
	case q.IopsMax > 0 && q.IopsMin > q.IopsMax, q.BytesPerSecondMax > 0 && q.BytesPerSecondMin > q.BytesPerSecondMax:
		return status.Errorf(status.Invalid, "a volume cannot be promised more than it may have at most")
	case q.BytesPerSecondMax > 0 && q.BytesPerSecondMax < 64<<10:
		return status.Errorf(status.Invalid, "a bandwidth of %d bytes a second is not possible: at least 64K", q.BytesPerSecondMax)
	}
	return nil
}

func (a *apply) updateVolume(op *pb.UpdateVolume) (*pb.Result, error) {
	v, err := a.find(op.Volume)
	if err != nil {
		return nil, err
	}
	tags := map[string]string{}
	for k, x := range v.Tags {
		tags[k] = x
	}
	for _, k := range op.RemoveTags {
		delete(tags, k)
	}
	for k, x := range op.SetTags {
		tags[k] = x
	}
	if err := checkTags(tags); err != nil {
		return nil, err
	}
	if err := checkQos(op.Qos); err != nil {
		return nil, err
	}
	v.Tags = tags
	if op.Qos != nil {
		if v.Qos = op.Qos; proto.Equal(v.Qos, &pb.Qos{}) {
			v.Qos = nil
		}
		a.event("volume %s: at most %d IOPS and %s a second, at least %d and %s (0: no bound)", v.Name, op.Qos.IopsMax, ids.FormatSize(op.Qos.BytesPerSecondMax), op.Qos.IopsMin, ids.FormatSize(op.Qos.BytesPerSecondMin))
	} else {
		a.event("volume %s: %d tags", v.Name, len(tags))
	}
	put(a.kv, key(tVolume, v.Id), v)
	return &pb.Result{Volume: v}, nil
}
