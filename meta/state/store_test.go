package state

import (
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"

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

// Volumes are created together or not at all.
func TestCreatingManyVolumes(t *testing.T) {
	c := newCluster(t)
	like := create("").GetCreateVolume()
	many := func(names ...string) *pb.Command {
		return &pb.Command{Op: &pb.Command_CreateVolumes{CreateVolumes: &pb.CreateVolumes{Like: like, Names: names}}}
	}
	if err := CheckFormat(c.kv, many("a")); !errors.Is(err, status.Unsupported) {
		t.Errorf("nodes that do not know it are sent it: %v", err)
	}
	c.raise(Format)
	c.ok(&pb.Command{Op: &pb.Command_SetTenant{SetTenant: &pb.SetTenant{Tenant: "acme", LogicalQuotaBytes: 5 * like.SizeBytes}}})
	like.Tenant = "acme"
	first := many("a", "b", "c")
	res := c.ok(first)
	if len(res.Volumes) != 3 || res.Volume != nil {
		t.Fatalf("created: %v", res)
	}
	for i, name := range []string{"a", "b", "c"} {
		if v := c.volume(name); v == nil || v.Id != res.Volumes[i].Id || v.Name != name || v.SizeBytes != like.SizeBytes || i > 0 && v.Id == res.Volumes[0].Id {
			t.Errorf("%s is %v, answered as %v", name, v, res.Volumes[i])
		}
	}
	if again := c.raw(first); !proto.Equal(again, res) { // its answer was lost
		t.Errorf("asked again: %v, first %v", again, res)
	}
	c.refused(status.Exists, "volume b exists", many("x", "b"))
	c.refused(status.Invalid, "x is to be created twice", many("x", "y", "x"))
	c.refused(status.Invalid, "name", many("x", "Not A Name"))
	c.refused(status.NoSpace, "tenant acme", many("x", "y", "z"))
	c.refused(status.Invalid, "1 to 256", many())
	c.refused(status.Invalid, "1 to 256", many(make([]string, 257)...))
	like.Thick, like.Tenant, like.SizeBytes = true, "", StoreBytes(c.kv)/9>>30<<30
	c.refused(status.NoSpace, "set aside", many("x", "y", "z", "zz"))
	for _, name := range []string{"x", "y", "z"} {
		if v := c.volume(name); v != nil {
			t.Errorf("refused, and there: %v", v)
		}
	}
	c.ok(many("x", "y", "z"))
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
