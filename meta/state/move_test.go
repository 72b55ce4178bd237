package state

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// fourHosts is a cluster with one spare host and a volume with a chunk.
func fourHosts(t *testing.T) *cluster {
	c := newCluster(t)
	c.ok(&pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: "host-4", DataAddr: "host-4:1"}}}})
	c.ok(&pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: storeID(3), Incarnation: 1, Host: "host-4", CapacityBytes: 1 << 40}}}})
	c.ok(create("v"))
	c.ok(attach("v", "host-1", false))
	c.ok(allocate(c.volume("v"), 1, 0))
	return c
}

func (c *cluster) moves(mv ...*pb.ChunkMove) *pb.Command {
	v := c.volume("v")
	return &pb.Command{Op: &pb.Command_MoveChunks{MoveChunks: &pb.MoveChunks{VolumeId: v.Id, Epoch: v.Epoch, Revision: v.Revision, Moves: mv}}}
}

func plan(from, to byte) *pb.ChunkMove {
	mv := &pb.ChunkMove{To: storeID(to)}
	if from > 0 {
		mv.From = storeID(from - 1)
	}
	return mv
}

func done(to byte) *pb.ChunkMove {
	return &pb.ChunkMove{To: storeID(to), ToIncarnation: 1, Step: pb.ChunkMove_DONE}
}

func (c *cluster) chunk() *pb.Chunk { return ChunkAt(c.kv, c.volume("v").Id, 0) }

func TestACopyMoves(t *testing.T) {
	c := fourHosts(t)
	before := c.volume("v").Revision
	res := c.ok(c.moves(plan(3, 3)))
	if len(res.Chunks[0].Filling) != 1 || member(c.volume("v"), storeID(3)) == nil || c.volume("v").Revision != before+1 {
		t.Fatalf("the plan is not there: %v, %v", res.Chunks, c.volume("v"))
	}
	if len(c.chunk().Stores) != 3 || !bytes.Equal(c.chunk().Stores[2], storeID(2)) {
		t.Fatalf("a plan changed what counts: %v", c.chunk())
	}
	c.ok(c.moves(done(3)))
	if ch := c.chunk(); len(ch.Filling) != 0 || len(ch.Stores) != 3 || !bytes.Equal(ch.Stores[2], storeID(3)) {
		t.Fatalf("the copy does not count: %v", ch)
	}
	if member(c.volume("v"), storeID(2)) != nil || c.kv.Get(key(tUse, storeID(2), c.volume("v").Id)) != nil {
		t.Fatal("a store that has nothing of the volume is still a member")
	}
	// An unknown outcome is settled by asking again: the answer is the same.
	revision := c.volume("v").Revision
	res = c.ok(c.moves(done(3)))
	if !bytes.Equal(res.Chunks[0].Stores[2], storeID(3)) || c.volume("v").Revision != revision {
		t.Fatalf("asked again: %v, revision %d instead of %d", res.Chunks, c.volume("v").Revision, revision)
	}
}

// An attach that is asked again answers a volume and a map of one moment: a chunk
// that has moved meanwhile names a member of the volume. Once its epoch is over
// there is nothing left to answer.
func TestAnAttachAskedAgainAnswersOneMoment(t *testing.T) {
	c := fourHosts(t)
	first := attach("v", "host-1", true)
	c.ok(first)
	c.ok(c.moves(plan(3, 3)))
	c.ok(c.moves(done(3)))
	res := c.raw(proto.Clone(first).(*pb.Command))
	if res.Status != 0 || res.Volume.Epoch != c.volume("v").Epoch {
		t.Fatalf("asked again: %v", res)
	}
	for _, id := range res.Chunks[0].Stores {
		if member(res.Volume, id) == nil {
			t.Errorf("its chunk names store %x, which is no member of the volume it answers", id)
		}
	}
	c.ok(attach("v", "host-2", true))
	if res := c.raw(proto.Clone(first).(*pb.Command)); status.Kind(res.Status) != status.Fenced {
		t.Errorf("after another attach it is answered %v", res)
	}
}

// What would count a copy that has not everything, or put two copies where one
// accident takes both, changes nothing.
func TestMovesThatAreNotPossible(t *testing.T) {
	for name, try := range map[string]func(*cluster) *pb.Command{
		"nobody planned it": func(c *cluster) *pb.Command { return c.moves(done(3)) },
		"another incarnation": func(c *cluster) *pb.Command {
			return c.moves(plan(3, 3), &pb.ChunkMove{To: storeID(3), ToIncarnation: 2, Step: pb.ChunkMove_DONE})
		},
		"the same domain":       func(c *cluster) *pb.Command { return c.moves(plan(3, 1)) },
		"no such store":         func(c *cluster) *pb.Command { return c.moves(plan(3, 9)) },
		"more than wanted":      func(c *cluster) *pb.Command { return c.moves(plan(0, 3)) },
		"of a store it has not": func(c *cluster) *pb.Command { return c.moves(plan(9, 3)) },
		"too few would be left": func(c *cluster) *pb.Command {
			return c.moves(&pb.ChunkMove{From: storeID(0), Step: pb.ChunkMove_DONE})
		},
		"an out-of-sync member": func(c *cluster) *pb.Command {
			c.ok(c.moves(plan(3, 3)))
			c.ok(change(c.volume("v"), 4, 0))
			return c.moves(done(3))
		},
		"a drained host": func(c *cluster) *pb.Command {
			c.ok(&pb.Command{Op: &pb.Command_SetHost{SetHost: &pb.SetHost{Host: "host-4", Drained: true}}})
			return c.moves(plan(3, 3))
		},
	} {
		c := fourHosts(t)
		cmd := try(c)
		res := c.ok(cmd)
		if ch := res.Chunks[0]; len(ch.Stores) != 3 || !bytes.Equal(ch.Stores[2], storeID(2)) {
			t.Errorf("%s: %v", name, ch)
		}
	}
	c := fourHosts(t)
	late := c.moves(plan(3, 3))
	late.GetMoveChunks().Revision--
	if res := c.do(late); status.Kind(res.Status) != status.Conflict {
		t.Errorf("an old revision: %v", res)
	}
	late = c.moves(plan(3, 3))
	c.ok(attach("v", "host-2", true))
	if res := c.do(late); status.Kind(res.Status) != status.Fenced {
		t.Errorf("an old epoch: %v", res)
	}
}

func TestTheNumberOfReplicasChanges(t *testing.T) {
	c := fourHosts(t)
	set := func(n uint32) *pb.Command {
		return &pb.Command{Op: &pb.Command_SetReplicas{SetReplicas: &pb.SetReplicas{Volume: "v", Replicas: n}}}
	}
	c.ok(set(4))
	if !NeedsCare(c.kv, c.volume("v")) {
		t.Error("a chunk with too few copies needs no care")
	}
	c.ok(c.moves(plan(0, 3)))
	c.ok(c.moves(done(3)))
	if len(c.chunk().Stores) != 4 || NeedsCare(c.kv, c.volume("v")) {
		t.Fatalf("no fourth copy: %v", c.chunk())
	}
	c.ok(set(2))
	c.ok(change(c.volume("v"), 2, 0))
	giveUp := func(i byte) *pb.Command { return c.moves(&pb.ChunkMove{From: storeID(i), Step: pb.ChunkMove_DONE}) }
	c.ok(giveUp(0))
	c.ok(giveUp(2))
	c.ok(giveUp(3))
	if ch := c.chunk(); len(ch.Stores) != 2 || !bytes.Equal(ch.Stores[1], storeID(3)) {
		t.Errorf("copies given up: %v", ch)
	}
	for n, want := range map[uint32]status.Kind{0: status.Invalid, 6: status.Invalid, 5: status.NoSpace} {
		if res := c.do(set(n)); status.Kind(res.Status) != want {
			t.Errorf("%d replicas: %v", n, res)
		}
	}
}

// A hand-over ends the epoch and begins the next in one entry; nothing of the
// old holder commits afterwards.
func TestHandOver(t *testing.T) {
	c := fourHosts(t)
	v := c.volume("v")
	over := &pb.Command{Op: &pb.Command_HandOver{HandOver: &pb.HandOver{VolumeId: v.Id, Epoch: v.Epoch, Host: "host-2", Session: "gw-host-2"}}}
	res := c.ok(over)
	if n := res.Volume; n.Epoch != v.Epoch+1 || n.HolderHost != "host-2" || n.Moved || len(res.Chunks) != 1 {
		t.Fatalf("handed over: %v", res)
	}
	if res := c.do(change(v, 2, 0)); status.Kind(res.Members[0].Status) != status.Fenced {
		t.Errorf("the old holder still commits: %v", res)
	}
	if res := c.do(over); status.Kind(res.Status) != status.Fenced {
		t.Errorf("handed over twice: %v", res)
	}
	if res := c.ok(attach("v", "host-2", false)); res.Volume.Moved {
		t.Error("the new holder's attach waits for a lease")
	}
}

// A maintenance session holds a volume against nobody, and takes it from nobody.
func TestMaintenance(t *testing.T) {
	c := fourHosts(t)
	care := attach("v", "host-3", false)
	care.GetAttach().Maintenance = true
	if res := c.do(care); status.Kind(res.Status) != status.Held {
		t.Fatalf("it takes an attached volume: %v", res)
	}
	c.ok(&pb.Command{Op: &pb.Command_Detach{Detach: &pb.Detach{VolumeId: c.volume("v").Id, Epoch: 1}}})
	c.ok(care)
	if res := c.do(attachCare("host-2")); status.Kind(res.Status) != status.Held {
		t.Errorf("two sessions at a time: %v", res)
	}
	over := attachCare("host-2")
	over.GetAttach().Takeover = true // its lease is over
	c.ok(over)
	res := c.ok(attach("v", "host-1", false))
	if res.Volume.Maintenance || res.Volume.Moved {
		t.Errorf("attached over a maintenance session: %v", res.Volume)
	}
}

func attachCare(host string) *pb.Command {
	cmd := attach("v", host, false)
	cmd.GetAttach().Maintenance = true
	return cmd
}
