package state

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const day = int64(86400) * 1e9

// at gives a command the leader's time.
func at(cmd *pb.Command, ns int64) *pb.Command { cmd.TimeUnixNs = ns; return cmd }

func removeVolume(name string, keepSeconds int64) *pb.Command {
	return &pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: name, KeepSeconds: keepSeconds}}}
}

func undelete(name, as string) *pb.Command {
	return &pb.Command{Op: &pb.Command_UndeleteVolume{UndeleteVolume: &pb.UndeleteVolume{Volume: name, Name: as}}}
}

func detach(v *pb.Volume) *pb.Command {
	return &pb.Command{Op: &pb.Command_Detach{Detach: &pb.Detach{VolumeId: v.Id, Epoch: v.Epoch}}}
}

// tick is the leader's housekeeping, until nothing is due.
func (c *cluster) tick(ns int64) (steps int) {
	defer func() { // the session of these tests may be too old by now
		c.raw(&pb.Command{Session: "s", TimeUnixNs: ns, Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}})
		c.seq = u64(c.kv.Get(key(tSession, "s"))[8:])
	}()
	for {
		due := NextDue(c.kv)
		if due == 0 || due > ns {
			return steps
		}
		if res := c.raw(&pb.Command{TimeUnixNs: ns, Op: &pb.Command_Housekeeping{Housekeeping: &pb.Housekeeping{}}}); res.Status != 0 {
			c.t.Fatal(res.Detail)
		}
		if steps++; steps > 1000 {
			c.t.Fatal("housekeeping does not come to an end")
		}
	}
}

// filled makes a volume with n chunks that is attached on host-1.
func (c *cluster) filled(name string, n uint32) *pb.Volume {
	c.t.Helper()
	c.ok(create(name))
	v := c.ok(attach(name, "host-1", false)).Volume
	for i := range n {
		v = c.ok(allocate(v, v.Epoch, i)).Volume
	}
	return v
}

// audit compares the rows of what is counted with a recount.
func (c *cluster) audit() {
	c.t.Helper()
	tenants, pool := map[string]*pb.Tenant{}, &pb.Pool{}
	c.kv.Scan(key(tVolume), nil, func(_, b []byte) bool {
		v := &pb.Volume{}
		decode(b, v)
		t := tenants[v.Tenant]
		if t == nil {
			t = &pb.Tenant{Name: v.Tenant}
			tenants[v.Tenant] = t
		}
		n := uint64(len(Chunks(c.kv, v.Id)))
		if n != v.ChunkCount {
			c.t.Fatalf("volume %s counts %d chunks and has %d", v.Name, v.ChunkCount, n)
		}
		placed := n * v.ChunkBytes * uint64(v.Replicas)
		t.Volumes++
		t.LogicalBytes += v.SizeBytes
		t.PhysicalBytes += placed
		pool.LogicalBytes += v.SizeBytes
		pool.PlacedBytes += placed
		if v.DeletedUnixNs > 0 {
			t.DeletedBytes += v.SizeBytes
			pool.DeletedBytes += placed
		}
		if v.Thick {
			pool.ThickBytes += max(v.SizeBytes*uint64(v.Replicas), placed)
			pool.ThickPlacedBytes += placed
		}
		return true
	})
	if got := PoolOf(c.kv); !proto.Equal(got, pool) {
		c.t.Fatalf("the pool counts %v, a recount gives %v", got, pool)
	}
	for _, t := range Tenants(c.kv) {
		want := tenants[t.Name]
		if want == nil {
			want = &pb.Tenant{Name: t.Name}
		}
		want.LogicalQuotaBytes, want.PhysicalQuotaBytes = t.LogicalQuotaBytes, t.PhysicalQuotaBytes
		if !proto.Equal(t, want) {
			c.t.Fatalf("tenant %q counts %v, a recount gives %v", t.Name, t, want)
		}
		delete(tenants, t.Name)
	}
	if len(tenants) > 0 {
		c.t.Fatalf("tenants without a row: %v", tenants)
	}
	if got, want := StoreBytes(c.kv), sumStores(c.kv); got != want {
		c.t.Fatalf("the stores have %d bytes, a recount gives %d", got, want)
	}
}

func TestADeletedVolumeComesBackUntilItsTimeIsOver(t *testing.T) {
	c := newCluster(t)
	c.raise(Format)
	v := c.filled("v", 3)
	rename := func(to string) *pb.Command {
		return &pb.Command{Op: &pb.Command_RenameVolume{RenameVolume: &pb.RenameVolume{Volume: "v", Name: to}}}
	}
	c.refused(status.Held, "detach", removeVolume("v", 60))
	c.refused(status.Held, "detach", rename("x")) // its user's client has the name
	c.ok(rename("v"))
	c.ok(detach(v))
	c.ok(&pb.Command{Op: &pb.Command_PutVm{PutVm: &pb.PutVM{Create: true, Vm: &pb.VM{Name: "m", Volume: "x", Disks: []string{"v"}, Desired: "stopped"}}}})
	c.refused(status.Held, "disk of VM m", removeVolume("v", 60))
	c.refused(status.Held, "disk of VM m", rename("y"))
	c.ok(&pb.Command{Op: &pb.Command_DeleteVm{DeleteVm: &pb.DeleteVM{Name: "m"}}})
	c.ok(removeVolume("v", 3600))
	c.audit()
	if c.volume("v") != nil || len(Volumes(c.kv)) != 0 || len(DeletedVolumes(c.kv)) != 1 || len(Gone(c.kv, []uint64{v.Id})) != 0 {
		t.Fatal("a deleted volume is there, or gone")
	}
	c.refused(status.NotFound, "undelete id:1", attach("id:1", "host-1", false))
	c.refused(status.NotFound, "no volume", attach("v", "host-1", false))
	c.ok(create("v")) // the name is free
	c.refused(status.Exists, "another name", undelete("v", ""))
	back := c.ok(undelete("v", "w")).Volume
	if back.Id != v.Id || len(Chunks(c.kv, back.Id)) != 3 || back.Epoch != v.Epoch || c.volume("w") == nil {
		t.Fatalf("came back as %v", back)
	}
	c.tick(2 * 3600e9) // its old time means nothing any more
	c.ok(removeVolume("w", 60))
	c.ok(removeVolume("v", 60))
	c.refused(status.NotFound, "cannot be had back", at(undelete("id:2", "x"), 2*3600e9+61e9)) // although nothing was purged yet
	c.audit()
}

func TestPurgingGoesInPieces(t *testing.T) {
	c := newCluster(t)
	v := c.filled("v", 2)
	for i := uint32(100); i < 100+2*purgeChunks; i++ { // more than one command removes
		put(c.kv, key(tChunk, v.Id, i), &pb.Chunk{Index: i, Id: uint64(i)})
	}
	v = c.volume("v")
	v.ChunkCount += 2 * purgeChunks
	put(c.kv, key(tVolume, v.Id), v)
	c.audit()
	c.ok(detach(v))
	c.ok(at(removeVolume("v", 3600), 5e9))
	if n := c.tick(3600e9 + 4e9); n != 0 {
		t.Fatalf("%d steps before its time", n)
	}
	if n := c.tick(3600e9 + 6e9); n < 3 || len(Gone(c.kv, []uint64{v.Id})) != 1 || NextDue(c.kv) != 0 {
		t.Fatalf("%d steps; gone %v", n, Gone(c.kv, []uint64{v.Id}))
	}
	c.audit()
	left := 0
	c.kv.Scan(key(tUse), nil, func(_, _ []byte) bool { left++; return true })
	c.kv.Scan(key(tChunk), nil, func(_, _ []byte) bool { left++; return true })
	if left != 0 {
		t.Fatalf("%d pairs of it are left", left)
	}
	w := c.filled("w", 1)
	c.ok(detach(w))
	c.ok(removeVolume("w", 3600))
	c.ok(&pb.Command{Op: &pb.Command_PurgeVolume{PurgeVolume: &pb.PurgeVolume{Volume: "w"}}})
	c.refused(status.NotFound, "no deleted volume", undelete("w", ""))
	c.audit()
}

func shrink(v *pb.Volume, size uint64, discard bool, keep int64) *pb.Command {
	return &pb.Command{Op: &pb.Command_ShrinkVolume{ShrinkVolume: &pb.ShrinkVolume{VolumeId: v.Id, Epoch: v.Epoch, SizeBytes: size, DiscardTail: discard, KeepSeconds: keep}}}
}

func undoShrink(name string, forget bool) *pb.Command {
	return &pb.Command{Op: &pb.Command_UndoShrink{UndoShrink: &pb.UndoShrink{Volume: name, Forget: forget}}}
}

func resize(name string, size uint64) *pb.Command {
	return &pb.Command{Op: &pb.Command_ResizeVolume{ResizeVolume: &pb.ResizeVolume{Volume: name, SizeBytes: size}}}
}

func TestAShrinkCanBeUndoneUntilItIsFinal(t *testing.T) {
	c := newCluster(t)
	v := c.filled("v", 8)
	size, cb := v.SizeBytes, v.ChunkBytes
	c.refused(status.Invalid, "no shrinking", shrink(v, size, false, 60))
	c.refused(status.Invalid, "64M or 128M", shrink(v, cb+4096, true, 60))
	late := proto.Clone(v).(*pb.Volume)
	late.Epoch--
	c.refused(status.Fenced, "over", shrink(late, 2*cb, true, 60))
	s := c.ok(shrink(v, 2*cb, true, 3600)).Volume
	if s.Revision <= v.Revision || s.SizeBytes != 2*cb || len(Chunks(c.kv, v.Id)) != 8 {
		t.Fatalf("shrunk: %v", s)
	}
	c.audit()
	bad := allocate(s, s.Epoch, 9)
	c.refused(status.Invalid, "beyond the end", bad)
	c.refused(status.Conflict, "undo-shrink v", resize("v", 3*cb))
	s = c.ok(undoShrink("v", false)).Volume
	if s.SizeBytes != size || len(Chunks(c.kv, v.Id)) != 8 {
		t.Fatal("undone and not as it was")
	}
	c.refused(status.NotFound, "no shrink", undoShrink("v", false))
	c.tick(day) // the old deadline means nothing
	if len(Chunks(c.kv, v.Id)) != 8 {
		t.Fatal("chunks were cut after the undo")
	}
	s = c.ok(at(shrink(s, 4*cb+4096, false, 60), day)).Volume
	c.ok(shrink(s, 2*cb, true, 3600)) // the first deadline is put off
	c.tick(day + 61e9)
	if s = c.volume("v"); s.ShrunkFrom != size {
		t.Fatalf("the first deadline ended the second's window: %v", s)
	}
	c.ok(undoShrink("v", true))
	c.refused(status.Unavailable, "ask again", resize("v", 3*cb))
	c.tick(day + 62e9)
	if s = c.volume("v"); s.ShrunkFrom != 0 || len(Chunks(c.kv, v.Id)) != 2 || s.ChunkCount != 2 {
		t.Fatalf("final: %v with %d chunks", s, len(Chunks(c.kv, v.Id)))
	}
	waste := WasteOf(c.kv, storeID(1))
	if len(waste) != 6 || waste[0].VolumeId != v.Id {
		t.Fatalf("copies to drop: %v", waste)
	}
	c.ok(&pb.Command{Op: &pb.Command_DroppedCopies{DroppedCopies: &pb.DroppedCopies{Store: storeID(1), Copies: waste[:4]}}})
	if n := len(WasteOf(c.kv, storeID(1))); n != 2 || len(WasteOf(c.kv, storeID(0))) != 6 {
		t.Fatalf("%d left to drop", n)
	}
	c.ok(resize("v", 16*cb))
	s = c.volume("v")
	fresh := c.ok(allocate(s, s.Epoch, 5)).Chunks[0]
	for _, w := range WasteOf(c.kv, storeID(0)) {
		if w.ChunkId == fresh.Id {
			t.Fatal("a chunk's id was used again")
		}
	}
	c.audit()
}

// A second shrink that is kept for less leaves the first one its time; a state of the
// version before does as it always did.
func TestASecondShrinkLeavesTheFirstItsTime(t *testing.T) {
	for _, format := range []uint32{Format - 1, Format} {
		c := newCluster(t)
		c.raise(format)
		v := c.filled("v", 8)
		s := c.ok(shrink(v, 4*v.ChunkBytes, true, 3600)).Volume
		first := s.UndoUnixNs
		s = c.ok(shrink(s, 2*v.ChunkBytes, true, 60)).Volume
		if kept := s.UndoUnixNs == first; kept != (format >= 4) {
			t.Errorf("at version %d: until %d, and until %d after a second shrink", format, first, s.UndoUnixNs)
		}
		if s.ShrunkFrom != v.SizeBytes {
			t.Errorf("it can be undone to %d, and it had %d", s.ShrunkFrom, v.SizeBytes)
		}
		c.tick(61e9)
		if left := len(Chunks(c.kv, v.Id)); (left == 8) != (format >= 4) {
			t.Errorf("at version %d: %d chunks are left after the second's time", format, left)
		}
	}
}

func TestQuotasAndThickVolumes(t *testing.T) {
	c := newCluster(t)
	c.raise(Format)
	tenant := func(l, p uint64) *pb.Command {
		return &pb.Command{Op: &pb.Command_SetTenant{SetTenant: &pb.SetTenant{Tenant: "acme", LogicalQuotaBytes: l, PhysicalQuotaBytes: p}}}
	}
	of := func(name string, size uint64) *pb.Command {
		return &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: name, SizeBytes: size, Replicas: 3, Tenant: "acme"}}}
	}
	c.ok(tenant(3<<30, 6*64<<20))
	c.ok(of("a", 1<<30))
	c.refused(status.NoSpace, "tenant acme", of("b", 5<<30))
	c.refused(status.NoSpace, "tenant acme", resize("a", 4<<30))
	c.ok(resize("a", 2<<30))
	v := c.ok(attach("a", "host-1", false)).Volume
	v = c.ok(allocate(v, v.Epoch, 0)).Volume
	v = c.ok(allocate(v, v.Epoch, 1)).Volume
	c.refused(status.NoSpace, "with all copies", allocate(v, v.Epoch, 2))
	c.ok(allocate(v, v.Epoch, 1)) // is there already
	copies := func(name string, n uint32) *pb.Command {
		return &pb.Command{Op: &pb.Command_SetReplicas{SetReplicas: &pb.SetReplicas{Volume: name, Replicas: n}}}
	}
	c.ok(copies("a", 2))
	c.ok(tenant(3<<30, 5*64<<20))
	c.refused(status.NoSpace, "with all copies", copies("a", 3))
	c.ok(tenant(3<<30, 0))
	v = c.ok(copies("a", 3)).Volume
	c.ok(allocate(v, v.Epoch, 2))
	c.ok(detach(v))
	c.ok(removeVolume("a", 60))
	c.refused(status.NoSpace, "2 GiB of them are deleted", of("b", 2<<30))
	c.audit()

	// Three stores of 1 TiB: 3 TiB are there.
	thick := func(name string, size uint64) *pb.Command {
		return &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: name, SizeBytes: size, Replicas: 3, Thick: true}}}
	}
	c.ok(thick("t", 900<<30))
	c.refused(status.NoSpace, "set aside", thick("u", 200<<30))
	c.refused(status.NoSpace, "set aside", resize("t", 1<<40))
	big := &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: "thin", SizeBytes: 1 << 40, Replicas: 3, ChunkBytes: 1 << 30}}}
	c.ok(big) // a promise, no space
	w := c.ok(attach("thin", "host-1", false)).Volume
	n := uint32(0)
	for ; n < 1000; n++ {
		res := c.do(allocate(w, w.Epoch, n))
		if res.Status != 0 {
			if status.Kind(res.Status) != status.NoSpace {
				t.Fatal(res.Detail)
			}
			break
		}
		w = res.Volume
	}
	if n != 123 { // of 124 GiB that thick leaves free, 0.2 have deleted chunks
		t.Fatalf("thin volumes got %d GiB beside a thick one", n)
	}
	x := c.ok(attach("t", "host-1", false)).Volume
	x = c.ok(allocate(x, x.Epoch, 7)).Volume // its own space is there
	c.ok(copies("thin", 2))
	c.ok(thick("u", 40<<30)) // what the third copies took
	c.refused(status.NoSpace, "set aside", copies("thin", 3))
	c.ok(&pb.Command{Op: &pb.Command_ShrinkVolume{ShrinkVolume: &pb.ShrinkVolume{VolumeId: x.Id, Epoch: x.Epoch, SizeBytes: 800 << 30, KeepSeconds: 60}}})
	c.ok(thick("y", 90<<30))
	c.refused(status.NoSpace, "set aside", undoShrink("t", false))
	c.ok(removeVolume("y", 60))
	c.refused(status.NoSpace, "deleted ones have 576 MiB", undoShrink("t", false))
	c.audit()
}

// Whatever is done in whatever order, what is counted is what a recount gives.
func TestCountsAddUp(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 5))
		c := newCluster(t)
		c.ok(&pb.Command{Op: &pb.Command_SetTenant{SetTenant: &pb.SetTenant{Tenant: "a", LogicalQuotaBytes: 20 << 30}}})
		now := int64(1)
		name := func() string { return fmt.Sprintf("v%d", rng.IntN(6)) }
		for range 200 {
			now += rng.Int64N(1e9)
			v := c.volume(name())
			var cmd *pb.Command
			switch k := rng.IntN(10); {
			case v == nil && k < 3:
				cmd = undelete(name(), name())
			case v == nil:
				cmd = create(name())
				op := cmd.GetCreateVolume()
				op.Tenant, op.Thick, op.Replicas = []string{"", "a", "b"}[rng.IntN(3)], rng.IntN(4) == 0, uint32(1+rng.IntN(3))
			case k < 2:
				cmd = resize(v.Name, v.SizeBytes+uint64(rng.IntN(3))<<30)
			case k < 4:
				cmd = allocate(v, v.Epoch, uint32(rng.IntN(16)))
				cmd.GetAllocate().Chunks[0].Stores = cmd.GetAllocate().Chunks[0].Stores[:v.Replicas]
			case k < 5:
				cmd = shrink(v, v.ChunkBytes*uint64(1+rng.IntN(8)), true, rng.Int64N(3))
			case k < 6:
				cmd = undoShrink(v.Name, rng.IntN(2) == 0)
			case k < 7 && v.HolderSession == "":
				cmd = attach(v.Name, "host-1", false)
			case k < 8 && v.HolderSession != "":
				cmd = detach(v)
			default:
				cmd = removeVolume(v.Name, rng.Int64N(4))
			}
			c.do(at(cmd, now))
			if rng.IntN(8) == 0 {
				c.tick(now)
			}
			c.audit()
		}
	}
}

func TestTagsAndLimits(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	up := func(u *pb.UpdateVolume) *pb.Command {
		u.Volume = "v"
		return &pb.Command{Op: &pb.Command_UpdateVolume{UpdateVolume: u}}
	}
	c.ok(up(&pb.UpdateVolume{SetTags: map[string]string{"app": "db", "tier": "1"}}))
	v := c.ok(up(&pb.UpdateVolume{SetTags: map[string]string{"tier": "2"}, RemoveTags: []string{"app"}})).Volume
	if len(v.Tags) != 1 || v.Tags["tier"] != "2" {
		t.Fatalf("tags %v", v.Tags)
	}
	v = c.ok(up(&pb.UpdateVolume{Qos: &pb.Qos{IopsMax: 100, IopsMin: 10}})).Volume
	if v.Qos.GetIopsMax() != 100 || v.Tags["tier"] != "2" {
		t.Fatalf("limits %v", v)
	}
	c.refused(status.Invalid, "promised more", up(&pb.UpdateVolume{Qos: &pb.Qos{IopsMax: 10, IopsMin: 11}}))
	c.refused(status.Invalid, "64K", up(&pb.UpdateVolume{Qos: &pb.Qos{BytesPerSecondMax: 5}}))
	if v = c.ok(up(&pb.UpdateVolume{Qos: &pb.Qos{}})).Volume; v.Qos != nil {
		t.Fatalf("limits taken away: %v", v.Qos)
	}
}

// What an admin wanted and did not get stands in the event log, with who it was
// and why; what a gateway asks for again and again does not.
func TestRefusalsAreEvents(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	n := len(Events(c.kv, 0, 0))
	cmd := create("v")
	cmd.Who = "ann@desk"
	c.refused(status.Exists, "v", cmd)
	evs := Events(c.kv, 0, 0)
	if e := evs[len(evs)-1]; len(evs) != n+1 || e.Who != "ann@desk" || e.What != "create volume" || !strings.Contains(e.Outcome, "volume v exists") {
		t.Fatalf("the last event is %v", evs[len(evs)-1])
	}
	c.refused(status.NotFound, "id 77", &pb.Command{Op: &pb.Command_Detach{Detach: &pb.Detach{VolumeId: 77}}})
	if len(Events(c.kv, 0, 0)) != n+1 {
		t.Fatal("a gateway's refused command is an event")
	}
}

// A renamed volume is the same one, and its old name is free; but no VM loses a
// disk by it, and no volume its name.
func TestARenamedVolumeIsTheSame(t *testing.T) {
	rename := func(name, to string) *pb.Command {
		return &pb.Command{Op: &pb.Command_RenameVolume{RenameVolume: &pb.RenameVolume{Volume: name, Name: to}}}
	}
	c := newCluster(t)
	v := c.filled("v", 2) // attached, too
	c.ok(create("w"))
	c.refused(status.Exists, "w exists already", rename("v", "w"))
	c.refused(status.Invalid, "is not a name", rename("v", "Not A Name"))
	c.refused(status.NotFound, "none", rename("none", "x"))
	c.ok(rename("v", "v"))
	c.ok(rename("v", "x"))
	if x := c.volume("x"); x.GetId() != v.Id || x.HolderSession != v.HolderSession || len(Chunks(c.kv, x.Id)) != 2 || c.volume("v") != nil {
		t.Errorf("renamed: %v", x)
	}
	c.ok(create("v"))
	vm := &pb.VM{Name: "m", Cpus: 1, MemoryBytes: 1 << 20, Volume: "v", Disks: []string{"w"}, Desired: "stopped"}
	c.ok(&pb.Command{Op: &pb.Command_PutVm{PutVm: &pb.PutVM{Vm: vm, Create: true}}})
	c.refused(status.Held, "a disk of VM m", rename("v", "y"))
	c.refused(status.Held, "a disk of VM m", removeVolume("v", 60))
	c.refused(status.Held, "a disk of VM m", removeVolume("w", 60))
	before, seq := c.kv.Clone(), c.seq
	c.ok(rename("w", "y")) // as all programs did before version 3
	c.kv, c.seq = before, seq
	c.raise(3)
	c.refused(status.Held, "a disk of VM m", rename("w", "y"))
	c.audit()
}

// No two copies of a chunk are in one rack or zone if the volume says so, whatever
// placement answers; a host without the label is one of its own; and a volume that
// cannot be spread so is refused.
func TestCopiesAreInDifferentFailureDomains(t *testing.T) {
	c := newCluster(t)
	for i, labels := range []map[string]string{{"rack": "r1", "zone": "z"}, {"rack": "r1", "zone": "z"}, {"zone": "z"}} {
		name := fmt.Sprintf("host-%d", i+1)
		c.ok(&pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: name, DataAddr: name + ":1", Labels: labels}}}})
	}
	of := func(name, domain string, replicas uint32) *pb.Command {
		return &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: name, SizeBytes: 1 << 30, Replicas: replicas, Domain: domain}}}
	}
	c.refused(status.Invalid, "use host, rack or zone", of("x", "shelf", 2))
	c.refused(status.NoSpace, "3 replicas need 3 failure domains (rack) with stores and there are 2", of("x", "rack", 3))
	c.refused(status.NoSpace, "2 replicas need 2 failure domains (zone) with stores and there are 1", of("x", "zone", 2))
	c.ok(of("v", "rack", 2))
	v := c.ok(attach("v", "host-1", false)).Volume
	on := func(stores ...byte) *pb.Command {
		cmd := allocate(v, v.Epoch, 0)
		chunk := cmd.GetAllocate().Chunks[0]
		chunk.Stores = nil
		for _, s := range stores {
			chunk.Stores = append(chunk.Stores, storeID(s))
		}
		return cmd
	}
	c.refused(status.Conflict, "placed twice in rack r1", on(0, 1))
	c.ok(on(1, 2))
	c.audit()
}
