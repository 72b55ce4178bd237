package state

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// cluster is a state with one session, three hosts and a store on each.
type cluster struct {
	t   *testing.T
	kv  *Mem
	seq uint64
}

func newCluster(t *testing.T) *cluster {
	c := &cluster{t: t, kv: NewMem()}
	c.raw(&pb.Command{Session: "s", Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}})
	for i := range byte(3) {
		name := "host-" + string('1'+i)
		c.ok(&pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: name, DataAddr: name + ":1"}}}})
		c.ok(&pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: storeID(i), Incarnation: 1, Host: name, CapacityBytes: 1 << 40}}}})
	}
	return c
}

func storeID(i byte) []byte { return append(make([]byte, 15), i+1) }

func (c *cluster) raw(cmd *pb.Command) *pb.Result { return Apply(c.kv, cmd) }

// do numbers and applies; ok demands success.
func (c *cluster) do(cmd *pb.Command) *pb.Result {
	c.seq++
	cmd.Session, cmd.Seq = "s", c.seq
	return c.raw(cmd)
}

func (c *cluster) ok(cmd *pb.Command) *pb.Result {
	c.t.Helper()
	res := c.do(cmd)
	if res.Status != 0 {
		c.t.Fatalf("%v: %s", cmd.Op, res.Detail)
	}
	return res
}

func create(name string) *pb.Command {
	return &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: &pb.CreateVolume{Name: name, SizeBytes: 1 << 30, Replicas: 3}}}
}

func attach(name, host string, takeover bool) *pb.Command {
	return &pb.Command{Op: &pb.Command_Attach{Attach: &pb.Attach{Volume: name, Host: host, Session: "gw-" + host, Takeover: takeover}}}
}

func allocate(v *pb.Volume, epoch uint32, index uint32) *pb.Command {
	return &pb.Command{Op: &pb.Command_Allocate{Allocate: &pb.Allocate{VolumeId: v.Id, Epoch: epoch, Revision: v.Revision, Indices: []uint32{index},
		Chunks: []*pb.Chunk{{Index: index, Stores: [][]byte{storeID(0), storeID(1), storeID(2)}}}}}}
}

func change(v *pb.Volume, exclude, add byte) *pb.Command {
	m := &pb.MemberChange{VolumeId: v.Id, Epoch: v.Epoch, Revision: v.Revision, Floor: 9}
	if exclude > 0 {
		m.Exclude = [][]byte{storeID(exclude - 1)}
	}
	if add > 0 {
		m.Add, m.AddIncarnation = storeID(add-1), 1
	}
	return &pb.Command{Op: &pb.Command_ChangeMembers{ChangeMembers: &pb.ChangeMembers{Changes: []*pb.MemberChange{m}}}}
}

func (c *cluster) volume(name string) *pb.Volume { return VolumeByName(c.kv, name) }

func TestACommandAskedAgainIsDoneOnce(t *testing.T) {
	c := newCluster(t)
	cmd := create("v")
	first := c.ok(cmd)
	hash := HashAll(c.kv)
	again := c.raw(proto.Clone(cmd).(*pb.Command))
	if !proto.Equal(first, again) || len(Volumes(c.kv)) != 1 {
		t.Fatalf("asked again it answered %v, first %v", again, first)
	}
	if HashAll(c.kv) != hash {
		t.Fatal("asking again changed the state")
	}
	gone := proto.Clone(cmd).(*pb.Command)
	gone.TimeUnixNs = 2 * SessionAgeNs
	if res := c.raw(gone); status.Kind(res.Status) != status.Expired || len(Volumes(c.kv)) != 1 {
		t.Fatalf("a command of an expired session was answered %v", res)
	}
}

func TestBadCommandsAreRefusedInASentence(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	c.ok(attach("v", "host-1", false))
	vol := func(op *pb.CreateVolume) *pb.Command {
		return &pb.Command{Op: &pb.Command_CreateVolume{CreateVolume: op}}
	}
	for _, x := range []struct {
		cmd  *pb.Command
		kind status.Kind
		says string
	}{
		{create("v"), status.Exists, "v"},
		{create("Not A Name"), status.Invalid, "name"},
		{create(""), status.Invalid, "name"},
		{vol(&pb.CreateVolume{Name: "w", SizeBytes: 5000, Replicas: 3}), status.Invalid, "4096"},
		{vol(&pb.CreateVolume{Name: "w", Replicas: 3}), status.Invalid, "size"},
		{vol(&pb.CreateVolume{Name: "w", SizeBytes: 4096, Replicas: 4}), status.NoSpace, "there are 3"},
		{vol(&pb.CreateVolume{Name: "w", SizeBytes: 1 << 45, Replicas: 3}), status.NoSpace, "never be filled"},
		{attach("nobody", "host-1", false), status.NotFound, "nobody"},
		{attach("v", "host-2", false), status.Held, "host-1"},
		{&pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: "v"}}}, status.Held, "host-1"},
		{&pb.Command{Op: &pb.Command_ResizeVolume{ResizeVolume: &pb.ResizeVolume{Volume: "v", SizeBytes: 4096}}}, status.Invalid, "would be a shrink"},
		{&pb.Command{}, status.Unsupported, "newer"},
	} {
		res := c.do(x.cmd)
		if status.Kind(res.Status) != x.kind || !strings.Contains(res.Detail, x.says) {
			t.Errorf("%v: %v, %q; want %v saying %q", x.cmd.Op, status.Kind(res.Status), res.Detail, x.kind, x.says)
		}
	}
}

// A fenced gateway's late commands never commit: each is a compare-and-set on
// the epoch and the revision.
func TestLateCommandsOfAFencedGatewayFail(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	old := c.ok(attach("v", "host-1", false)).Volume
	c.ok(allocate(old, old.Epoch, 0))
	old = c.volume("v")
	now := c.ok(attach("v", "host-2", true)).Volume
	if now.Epoch != old.Epoch+1 {
		t.Fatalf("epoch %d after %d", now.Epoch, old.Epoch)
	}
	if res := c.do(allocate(now, old.Epoch, 1)); status.Kind(res.Status) != status.Fenced {
		t.Errorf("late allocation: %v", res)
	}
	if res := c.do(change(old, 3, 0)).Members[0]; status.Kind(res.Status) != status.Fenced {
		t.Errorf("late exclusion: %v", res)
	}
	det := &pb.Command{Op: &pb.Command_Detach{Detach: &pb.Detach{VolumeId: now.Id, Epoch: old.Epoch}}}
	if res := c.do(det); status.Kind(res.Status) != status.Fenced || c.volume("v").HolderHost != "host-2" {
		t.Errorf("late detach: %v", res)
	}
}

func TestMembershipIsACompareAndSet(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	v := c.ok(attach("v", "host-1", false)).Volume
	c.ok(allocate(v, v.Epoch, 0))
	v = c.volume("v")
	for _, m := range v.Members {
		if !m.InSync {
			t.Fatalf("a store that is new to the volume holds all there is: %v", m)
		}
	}
	c.ok(change(v, 2, 0))
	if res := c.do(change(v, 3, 0)).Members[0]; status.Kind(res.Status) != status.Conflict {
		t.Fatalf("a change at an old revision: %v", res)
	}
	v = c.volume("v")
	if v.Members[1].InSync || v.Members[1].Floor != 9 {
		t.Fatalf("excluded: %v", v.Members[1])
	}
	c.ok(change(v, 3, 0))
	v = c.volume("v")
	if res := c.do(change(v, 1, 0)).Members[0]; res.Status == 0 {
		t.Fatal("the last in-sync replica was excluded")
	}
	c.ok(change(v, 0, 2))
	if v = c.volume("v"); !v.Members[1].InSync {
		t.Fatal("an added member is in sync")
	}
	// A store that lost its memory is out of sync everywhere, also as the last.
	c.ok(&pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: storeID(0), Incarnation: 2, Host: "host-1", CapacityBytes: 1}}}})
	if after := c.volume("v"); after.Members[0].InSync || after.Revision != v.Revision+1 {
		t.Fatalf("another incarnation: %v at revision %d", after.Members[0], after.Revision)
	}
}

func TestAnIndexIsAllocatedOnce(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	v := c.ok(attach("v", "host-1", false)).Volume
	first := c.ok(allocate(v, v.Epoch, 5)).Chunks[0]
	v = c.volume("v")
	second := c.ok(allocate(v, v.Epoch, 5)).Chunks[0]
	if first.Id == 0 || first.Id != second.Id || len(Chunks(c.kv, v.Id)) != 1 {
		t.Fatalf("index 5 is chunk %d and chunk %d", first.Id, second.Id)
	}
	if res := c.do(allocate(v, v.Epoch, 16)); status.Kind(res.Status) != status.Invalid {
		t.Fatalf("an index beyond the volume: %v", res)
	}
}

// Moved says that only a lease can end some epoch since the last detach.
func TestMovedUntilDetached(t *testing.T) {
	c := newCluster(t)
	c.ok(create("v"))
	step := func(what string, cmd *pb.Command, moved bool) *pb.Volume {
		t.Helper()
		v := c.ok(cmd).Volume
		if v.Moved != moved || c.volume("v").Moved != moved {
			t.Fatalf("%s: moved is %v", what, v.Moved)
		}
		return v
	}
	again := func(session string, gone, takeover bool) *pb.Command {
		return &pb.Command{Op: &pb.Command_Attach{Attach: &pb.Attach{Volume: "v", Host: "host-1", Session: session, PredecessorGone: gone, Takeover: takeover}}}
	}
	step("first", again("a", false, false), false)
	step("the same session", again("a", false, false), false)
	step("a dead predecessor", again("b", true, false), false)
	step("taken over without proof", again("c", false, true), true)
	v := step("a dead predecessor that had taken over", again("d", true, false), true)
	step("detached", &pb.Command{Op: &pb.Command_Detach{Detach: &pb.Detach{VolumeId: v.Id, Epoch: v.Epoch}}}, false)
	step("another host, after a detach", attach("v", "host-2", false), false)
	step("another host's word about its own dead", again("e", true, true), true)
}

// Only what was given out and is not there any more is gone.
func TestGone(t *testing.T) {
	c := newCluster(t)
	c.ok(create("a"))
	b := c.ok(create("b")).Volume
	c.ok(&pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: "a"}}})
	if got := Gone(c.kv, []uint64{b.Id - 1, b.Id, b.Id + 1}); len(got) != 1 || got[0] != b.Id-1 {
		t.Fatalf("gone: %v", got)
	}
}
