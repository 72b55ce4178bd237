package state

import (
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
