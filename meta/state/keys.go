package state

import (
	"encoding/binary"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
)

// Tables, by the first byte of a key. Numbers are big-endian, so that byte
// order is number order. 0x00 belongs to the shell and is never in the hash.
//
//	m name               counters and singletons
//	v id(8)              pb.Volume
//	n name               volume id(8)
//	o origin(8) vol(8)   empty: the volume is a clone of the origin
//	c volume(8) index(4) pb.Chunk
//	u store(16) vol(8)   empty: the volume has the store as a member
//	h name               pb.Host
//	s id(16)             pb.Store
//	k name               pb.VM
//	e seq(8)             pb.Event
//	x session            last use (8), last seq (8)
//	t time(8) session    empty: sessions by last use
//	r session 0 seq(8)   pb.Result
//	j sha256(32)         pb.JoinToken
//	q name               pb.Tenant
//	w store vol(8) ch(8) empty: a copy of a chunk for its store to drop
//	d time(8) id(8)      empty: what Housekeeping has to do for a volume, by when
const (
	tMeta, tVolume, tName, tChunk, tUse, tHost  = 'm', 'v', 'n', 'c', 'u', 'h'
	tStore, tVM, tEvent, tSession, tAge, tReply = 's', 'k', 'e', 'x', 't', 'r'
	tToken, tTenant, tDue, tOrigin, tWaste      = 'j', 'q', 'd', 'o', 'w'
)

func key(table byte, parts ...any) []byte {
	k := []byte{table}
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			k = append(k, p...)
		case []byte:
			k = append(k, p...)
		case uint64:
			k = binary.BigEndian.AppendUint64(k, p)
		case uint32:
			k = binary.BigEndian.AppendUint32(k, p)
		default:
			panic(fmt.Sprintf("state: key part of type %T", p))
		}
	}
	return k
}

func u64(b []byte) uint64 {
	if len(b) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

func put64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// encode makes the same bytes on every node.
func encode(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("state: encoding %T: %v", m, err)) // only invalid UTF-8, refused at the door
	}
	return b
}

// put writes a message.
func put(kv KV, k []byte, m proto.Message) {
	b := encode(m)
	if v, is := m.(*pb.Volume); is && k[0] == tVolume {
		recount(kv, VolumeByID(kv, v.Id), v)
	}
	kv.Set(k, b)
}

// load reads a message; false when there is none. A value that does not decode
// is a broken invariant: the caller's store verifies checksums.
func load(kv KV, k []byte, m proto.Message) bool {
	b := kv.Get(k)
	if b == nil {
		return false
	}
	decode(b, m)
	return true
}

func decode(b []byte, m proto.Message) {
	if err := proto.Unmarshal(b, m); err != nil {
		panic(fmt.Sprintf("state: decoding %T: %v", m, err))
	}
}

// next raises a counter and returns its new value: ids are never used again.
func next(kv KV, name string) uint64 {
	n := u64(kv.Get(key(tMeta, name))) + 1
	kv.Set(key(tMeta, name), put64(n))
	return n
}

// all decodes every value of a table.
func all[T any, P interface {
	*T
	proto.Message
}](kv KV, prefix, from []byte, limit int) []P {
	var out []P
	kv.Scan(prefix, from, func(_, v []byte) bool {
		m := P(new(T))
		decode(v, m)
		out = append(out, m)
		return limit <= 0 || len(out) < limit
	})
	return out
}

// one returns the value at k, or nil.
func one[T any, P interface {
	*T
	proto.Message
}](kv KV, k []byte) P {
	m := P(new(T))
	if !load(kv, k, m) {
		return nil
	}
	return m
}

// VolumeByID returns a volume, or nil.
func VolumeByID(kv KV, id uint64) *pb.Volume { return one[pb.Volume](kv, key(tVolume, id)) }

// VolumeByName returns a volume by its name or by "id:N", or nil.
func VolumeByName(kv KV, name string) *pb.Volume {
	var id uint64
	if n, err := fmt.Sscanf(name, "id:%d", &id); n == 1 && err == nil {
		return VolumeByID(kv, id)
	}
	b := kv.Get(key(tName, name))
	if b == nil {
		return nil
	}
	return VolumeByID(kv, u64(b))
}

// Volumes returns all volumes by id, without deleted ones.
func Volumes(kv KV) []*pb.Volume {
	return volumesThat(kv, func(v *pb.Volume) bool { return v.DeletedUnixNs == 0 })
}

// Chunks returns the chunk map of a volume by index.
func Chunks(kv KV, volume uint64) []*pb.Chunk {
	return all[pb.Chunk](kv, key(tChunk, volume), nil, 0)
}

// ChunkAt returns the chunk at an index of a volume, or nil.
func ChunkAt(kv KV, volume uint64, index uint32) *pb.Chunk {
	return one[pb.Chunk](kv, key(tChunk, volume, index))
}

// Hosts returns all hosts by name.
func Hosts(kv KV) []*pb.Host { return all[pb.Host](kv, key(tHost), nil, 0) }

// HostByName returns a host, or nil.
func HostByName(kv KV, name string) *pb.Host { return one[pb.Host](kv, key(tHost, name)) }

// Stores returns all stores by id.
func Stores(kv KV) []*pb.Store { return all[pb.Store](kv, key(tStore), nil, 0) }

// StoreByID returns a store by its 16 bytes, or nil.
func StoreByID(kv KV, id []byte) *pb.Store {
	if len(id) != 16 {
		return nil
	}
	return one[pb.Store](kv, key(tStore, id))
}

// VMByName returns a VM, or nil.
func VMByName(kv KV, name string) *pb.VM { return one[pb.VM](kv, key(tVM, name)) }

// VMs returns all VMs by name.
func VMs(kv KV) []*pb.VM { return all[pb.VM](kv, key(tVM), nil, 0) }

// Events returns up to limit events with a number above after.
func Events(kv KV, after uint64, limit int) []*pb.Event {
	if after == ^uint64(0) {
		return nil
	}
	return all[pb.Event](kv, key(tEvent), key(tEvent, after+1), limit)
}

// ClusterID returns the cluster's identity, "" before InitCluster.
func ClusterID(kv KV) string { return string(kv.Get(key(tMeta, "cluster"))) }

// Label returns the value of a failure-domain label of a host. A host without
// the label is a domain of its own by its name.
func Label(h *pb.Host, domain string) string {
	if domain == "" || domain == "host" {
		return h.GetName()
	}
	if v := h.GetLabels()[domain]; v != "" {
		return v
	}
	return "host=" + h.GetName()
}

// Gone returns which of these volumes were removed. An id that was never given
// out is not gone: whoever asks belongs to another cluster, or this state is
// an older copy, and data must not be dropped at its word.
func Gone(kv KV, volumes []uint64) []uint64 {
	given := u64(kv.Get(key(tMeta, "volume")))
	lost := lostIDs(kv)
	var out []uint64
	for _, id := range volumes {
		if id <= given && !lost.has(id) && kv.Get(key(tVolume, id)) == nil {
			out = append(out, id)
		}
	}
	return out
}
