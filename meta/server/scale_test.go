package server

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
)

// A node with many volumes and chunks: what it costs in memory, at the start,
// and while a snapshot is taken. The numbers are printed; docs/SCALE.md has them.
//
//	CAIRN_META_VOLUMES=1000000 CAIRN_META_CHUNKS=20000000 go test -v -timeout 1h -run TestScale ./meta/server
//
// With CAIRN_META_DIR the node's directory is made there and stays: a second run
// with it makes none, so that making it need not disturb the measurement.
func TestScale(t *testing.T) {
	nv, nc := number(t, "CAIRN_META_VOLUMES", 2000), number(t, "CAIRN_META_CHUNKS", 40_000)
	dir := os.Getenv("CAIRN_META_DIR")
	if dir == "" {
		dir = t.TempDir()
	}
	node := filepath.Join(dir, "meta")
	var made, restored time.Duration
	if _, err := os.Stat(node); errors.Is(err, os.ErrNotExist) {
		made, restored = makeLarge(t, node, filepath.Join(dir, "backup"), nv, nc)
	}
	var s *Server
	begin := func() time.Duration {
		return timed(func() {
			var err error
			if s, err = solo(t, node, func(c *Config) { c.snapEvery = 1 << 40 }); err != nil {
				t.Fatal(err)
			}
			until(t, func() string {
				if s.node().Leader {
					return ""
				}
				return "no leader"
			})
		})
	}
	first := begin() // builds the state from the snapshot
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again := begin() // checks the state it has
	if !s.kept {
		t.Fatal("the state was not kept")
	}
	c, ctx := soloClient(t, s), context.Background()
	hostUp(t, ctx, c, 1)
	began := time.Now()
	took := func(n int) (ds []time.Duration) {
		for i := range n {
			ds = append(ds, timed(func() { must(t, ctx, c, create(fmt.Sprintf("new-%d-%d", began.Unix(), i))) }))
		}
		slices.Sort(ds)
		return ds
	}
	calm := took(200)
	snap := make(chan error, 1)
	began = time.Now()
	go func() { snap <- s.raft.Load().Snapshot().Error() }()
	var during []time.Duration
	for done := false; !done; {
		select {
		case err := <-snap:
			if err != nil {
				t.Fatal(err)
			}
			done = true
		default:
			during = append(during, timed(func() { must(t, ctx, c, create(fmt.Sprintf("during-%d-%d", began.Unix(), len(during)))) }))
		}
	}
	snapTook := time.Since(began)
	slices.Sort(during)
	longest := time.Duration(0)
	if len(during) > 0 {
		longest = during[len(during)-1]
	}
	t.Logf("%d volumes, %d chunks: backup made in %v, restored in %v; start %v from the snapshot, %v from its state; RSS %d MiB, peak %d MiB; snapshot %v; commits p50 %v calm, longest %v calm, %v during the snapshot",
		nv, nc, made.Round(time.Millisecond), restored.Round(time.Millisecond), first.Round(time.Millisecond), again.Round(time.Millisecond),
		memory(t, "VmRSS"), memory(t, "VmHWM"), snapTook.Round(time.Millisecond), calm[len(calm)/2], calm[len(calm)-1], longest)
	n := 0
	if err := s.fsm.read(func(kv state.KV) { n = len(state.Volumes(kv)) }); err != nil || n < nv {
		t.Fatalf("%d volumes are there: %v", n, err)
	}
}

// makeLarge makes the directory of a node of that size.
func makeLarge(t *testing.T, node, file string, nv, nc int) (made, restored time.Duration) {
	t.Helper()
	made = timed(func() { writeLarge(t, file, nv, nc) })
	cfg := Config{ID: "meta-1", Cluster: "test", Dir: node, Log: quiet(), Peers: []Peer{{ID: "meta-1", RaftAddr: "127.0.0.1:1", APIAddr: "127.0.0.1:2"}}}
	restored = timed(func() {
		if _, err := Restore(cfg, file); err != nil {
			t.Fatal(err)
		}
	})
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	return made, restored
}

func timed(fn func()) time.Duration {
	at := time.Now()
	fn()
	return time.Since(at)
}

// memory reads one line of /proc/self/status, in MiB.
func memory(t *testing.T, what string) (mib int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range strings.Split(string(b), "\n") {
		if rest, ok := strings.CutPrefix(l, what+":"); ok {
			if _, err := fmt.Sscan(rest, &mib); err != nil {
				t.Fatal(err)
			}
		}
	}
	return mib >> 10
}

// writeLarge makes a backup of a cluster of that size, in the order of its keys.
func writeLarge(t *testing.T, file string, volumes, chunks int) {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	var sum, count uint64
	const index = 1000
	pair := func(w *bufio.Writer, k []byte, m proto.Message, raw []byte) {
		if m != nil {
			if raw, err = proto.Marshal(m); err != nil {
				t.Fatal(err)
			}
		}
		sum += state.HashPair(k, raw)
		count++
		if err := writePair(w, k, raw); err != nil {
			t.Fatal(err)
		}
	}
	each := chunks / volumes
	write := func(w *bufio.Writer) {
		if _, err := w.Write(binary.BigEndian.AppendUint64([]byte(snapMagic), index)); err != nil {
			t.Fatal(err)
		}
		id := uint64(0)
		for v := 1; v <= volumes; v++ {
			for i := range each {
				id++
				k := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64([]byte{'c'}, uint64(v)), uint32(i))
				pair(w, k, &pb.Chunk{Index: uint32(i), Id: id, State: pb.ChunkState_CHUNK_STATE_LIVE, Stores: [][]byte{storeID(v % 200), storeID(v%200 + 1), storeID(v%200 + 2)}}, nil)
			}
		}
		for name, n := range map[string]int{"chunk": volumes * each, "volume": volumes} {
			pair(w, append([]byte{'m'}, name...), nil, binary.BigEndian.AppendUint64(nil, uint64(n)))
		}
		for v := 1; v <= volumes; v++ {
			pair(w, append([]byte{'n'}, fmt.Sprintf("volume-%d", v)...), nil, binary.BigEndian.AppendUint64(nil, uint64(v)))
		}
		for v := 1; v <= volumes; v++ {
			vol := &pb.Volume{Id: uint64(v), Name: fmt.Sprintf("volume-%d", v), SizeBytes: 100 << 30, ChunkBytes: 64 << 20, Replicas: 3, Domain: "host", Epoch: 1, Revision: 3, ChunkCount: uint64(each), CreatedUnixNs: 1}
			for m := range 3 {
				vol.Members = append(vol.Members, &pb.Member{Store: storeID(v%200 + m), Incarnation: 1, Host: fmt.Sprintf("host-%d", v%200+m), DataAddr: "10.0.0.1:7110", InSync: true})
			}
			pair(w, binary.BigEndian.AppendUint64([]byte{'v'}, uint64(v)), vol, nil)
		}
		if err := writeTail(w, count, sum); err != nil {
			t.Fatal(err)
		}
	}
	w := bufio.NewWriterSize(f, 1<<20)
	body := file + ".body" // the header has the hash of what follows
	b, err := os.Create(body)
	if err != nil {
		t.Fatal(err)
	}
	write(bufio.NewWriterSize(b, 1<<20))
	if err := writeHeader(w, BackupHeader{Cluster: "test", Time: time.Unix(1, 0), Index: index, Term: 1, Hash: fmt.Sprintf("%016x", sum), Format: int(state.Format)}); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadFrom(b); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Close(), b.Close(), os.Remove(body)); err != nil {
		t.Fatal(err)
	}
}
