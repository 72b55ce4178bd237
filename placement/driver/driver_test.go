package driver

import (
	"errors"
	"reflect"
	"slices"
	"testing"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

func stores() []server.StoreView {
	var out []server.StoreView
	for i, h := range []string{"host-1", "host-2", "host-3", "host-4"} {
		out = append(out, server.StoreView{ID: ids.StoreID{byte(i + 1)}, Host: h, Domain: h, Up: true, CapacityBytes: 10 << 30})
	}
	return out
}

func TestNewChunksAreSpreadAndLocal(t *testing.T) {
	req := server.ChunkRequest{Count: 2, Replicas: 3, ChunkBytes: 64 << 20, PreferHost: "host-2", Stores: stores()}
	got, err := New().PlaceChunks(req)
	if err != nil || len(got) != 2 {
		t.Fatal(got, err)
	}
	for _, c := range got {
		if len(c) != 3 || c[0] != (ids.StoreID{2}) {
			t.Errorf("chunk is on %v, want store 2 first", c)
		}
	}
	slices.Reverse(req.Stores)
	again, err := New().PlaceChunks(req)
	if err != nil || !reflect.DeepEqual(got, again) {
		t.Errorf("another node answers %v (%v), not %v", again, err, got)
	}
}

// A guest must not hang at a new chunk because other hosts are down: one ready
// store is enough, and none is an error that is worth asking again.
func TestDownHostsDoNotStopAllocation(t *testing.T) {
	req := server.ChunkRequest{Count: 1, Replicas: 3, ChunkBytes: 64 << 20, PreferHost: "host-1", Stores: stores()[:3]}
	for i := range req.Stores {
		req.Stores[i].Member, req.Stores[i].InSync, req.Stores[i].Up = true, i == 0, i == 0
	}
	got, err := New().PlaceChunks(req)
	if err != nil || len(got[0]) != 3 || got[0][0] != (ids.StoreID{1}) {
		t.Fatal(got, err)
	}
	req.Stores[0].Up = false
	if _, err = New().PlaceChunks(req); !errors.Is(err, status.Unavailable) {
		t.Fatalf("got %v", err)
	}
}

// Volumes that look alike but meet other usage or another writer draw other
// lots.
func TestSeedFollowsContent(t *testing.T) {
	base := server.ChunkRequest{Count: 1, Replicas: 1, ChunkBytes: 1, Stores: stores()}
	seen := map[uint64]bool{seed(base): true}
	for _, change := range []func(*server.ChunkRequest){
		func(r *server.ChunkRequest) { r.Volume = 7 },
		func(r *server.ChunkRequest) { r.PreferHost = "host-1" },
		func(r *server.ChunkRequest) { r.Stores[0].UsedBytes = 4096 },
		func(r *server.ChunkRequest) { r.Stores[1].UsedBytes = 4096 },
		func(r *server.ChunkRequest) { r.Stores[1].Member = true },
	} {
		r := base
		r.Stores = stores()
		change(&r)
		if s := seed(r); seen[s] {
			t.Errorf("seed %x came twice", s)
		} else {
			seen[s] = true
		}
	}
}
