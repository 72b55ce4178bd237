package state

import (
	"errors"
	"testing"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

func storeIn(life, incarnation uint64, host string) *pb.Command {
	return &pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: storeID(0), Incarnation: incarnation, Host: host,
		CapacityBytes: 1 << 40, Life: life}}}}
}

// A store that may be an older copy is let in with another incarnation only.
func TestAnOlderCopyOfAStoreIsRefused(t *testing.T) {
	c := newCluster(t)
	host := StoreByID(c.kv, storeID(0)).Host
	c.ok(storeIn(3, 1, host))
	c.ok(storeIn(4, 1, host))
	c.refused(status.Conflict, "older copy", storeIn(4, 1, host))
	c.refused(status.Conflict, "older copy", storeIn(2, 1, host))
	c.refused(status.Conflict, "may be an older copy", storeIn(9, 1, "host-2"))
	if s := StoreByID(c.kv, storeID(0)); s.Life != 4 || s.Host != host {
		t.Fatalf("a refused store has changed what is known: %v", s)
	}
	c.ok(storeIn(2, 2, host))
	c.ok(storeIn(3, 2, host))
}

func TestRetiringAStore(t *testing.T) {
	c := newCluster(t)
	retire := func(id []byte, yes bool) *pb.Command {
		return &pb.Command{Op: &pb.Command_RetireStore{RetireStore: &pb.RetireStore{Store: id, Retired: yes}}}
	}
	c.refused(status.NotFound, "no store", retire([]byte("nobody's store 1"), true))
	c.ok(retire(storeID(0), true))
	if !StoreByID(c.kv, storeID(0)).Retired {
		t.Fatal("not retired")
	}
	c.ok(retire(storeID(0), false))
	if StoreByID(c.kv, storeID(0)).Retired {
		t.Fatal("still retired")
	}
}

// Only a retired store that has no copy of anything is forgotten, and what it was
// to drop stays noted.
func TestRemovingAStore(t *testing.T) {
	c := newCluster(t)
	remove := &pb.Command{Op: &pb.Command_RemoveStore{RemoveStore: &pb.RemoveStore{Store: storeID(0)}}}
	if err := CheckFormat(c.kv, remove); !errors.Is(err, status.Unsupported) {
		t.Errorf("nodes that do not know it are sent it: %v", err)
	}
	c.raise(Format)
	if err := CheckFormat(c.kv, remove); err != nil {
		t.Error(err)
	}
	v := c.filled("v", 1)
	c.refused(status.NotFound, "no store", &pb.Command{Op: &pb.Command_RemoveStore{RemoveStore: &pb.RemoveStore{Store: []byte("nobody's store 1")}}})
	c.refused(status.Conflict, "retire", remove)
	c.ok(&pb.Command{Op: &pb.Command_RetireStore{RetireStore: &pb.RetireStore{Store: storeID(0), Retired: true}}})
	c.refused(status.Held, "copy of volume v", remove)
	c.ok(detach(v))
	c.ok(removeVolume("v", 3600))
	c.ok(&pb.Command{Op: &pb.Command_PurgeVolume{PurgeVolume: &pb.PurgeVolume{Volume: "v"}}})
	c.tick(1)
	Waste(c.kv, storeID(0), 77, 78)
	c.ok(remove)
	if StoreByID(c.kv, storeID(0)) != nil || len(WasteOf(c.kv, storeID(0))) != 1 {
		t.Error("a removed store is there, or what it was to drop is not")
	}
	c.refused(status.NotFound, "no store", remove)
	c.audit()
}

// A store's class is its host's word at each start; one that nobody said is fast.
func TestStoresHaveAClass(t *testing.T) {
	c := newCluster(t)
	host := StoreByID(c.kv, storeID(0)).Host
	in := func(class string) *pb.Command {
		cmd := storeIn(0, 1, host)
		cmd.GetRegisterStore().Store.Class = class
		return cmd
	}
	for _, class := range []string{"", ClassSlow, ClassFast} {
		c.ok(in(class))
		want := class
		if class == "" {
			want = ClassFast
		}
		if got := ClassOf(StoreByID(c.kv, storeID(0))); got != want {
			t.Errorf("registered as %q, it is %s", class, got)
		}
	}
	c.refused(status.Invalid, "class", in("lukewarm"))
}
