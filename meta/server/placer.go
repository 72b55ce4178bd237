// Package server is one node of the metadata service: the shell around
// meta/state.
//
// Duty: raft on TCP, its log and snapshots on disk, the state in Badger; the
// calls of clients and hosts, answered by the leader; leases and liveness in
// the leader's memory. Floor: F3. It does not decide what a mutation does
// (meta/state) nor where chunks and VMs go (a Placer).
package server

import (
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
)

// Placer decides where chunks and VMs go. It is pure: everything it may use is
// in the request. The leader asks it; the state machine checks its answer.
type Placer interface {
	// PlaceChunks returns req.Replicas stores of distinct domains for each of
	// req.Count chunks, at least one of them up.
	PlaceChunks(req ChunkRequest) ([][]ids.StoreID, error)
	// PlaceVM returns the best host for a VM and a sentence saying why.
	// Unavailable: a better one may have room soon, the VM should wait.
	PlaceVM(p *Picture, vm string) (host, reason string, err error)
	// Leave plans where VMs go that must leave their hosts, at most max of them;
	// those that fit nowhere stay.
	Leave(p *Picture, vms []*pb.VM, max int) []*pb.BindVM
	// Turn plans what the queue does next.
	Turn(p *Picture) []*pb.BindVM
	// Answer explains decisions and plans moves; it changes nothing.
	Answer(p *Picture, q *pb.PlaceQuestion) (*pb.PlaceAnswer, error)
	// CheckPolicy refuses a policy the placer does not know.
	CheckPolicy(p *pb.Placement) error
}

// ChunkRequest asks for places of new chunks of one volume.
type ChunkRequest struct {
	Volume     ids.VolumeID // tells apart volumes that ask between two heartbeats
	Count      int
	Replicas   int
	ChunkBytes uint64
	PreferHost string // the writer's host: its own store first
	Slow       bool   // the copies are of slow stores
	Stores     []StoreView
}

// StoreView is a store as placement sees it.
type StoreView struct {
	ID            ids.StoreID
	Host          string
	Domain        string // value of the volume's failure-domain label
	Up            bool   // its host was heard of recently and the store is well
	Member        bool   // of the volume
	InSync        bool   // as a member; false for a non-member
	CapacityBytes uint64
	UsedBytes     uint64 // last heartbeat
	Slow          bool   // its class
	Drained       bool   // its host is: the last resort
}

// Picture is the cluster as placement sees it. It and what it returns are read
// only, and valid during one call.
type Picture struct {
	NowMs  int64
	Hosts  []HostView // by name
	VMs    []*pb.VM   // by name
	Policy *pb.Placement
	// Chunks returns the chunks of a VM's volumes.
	Chunks func(vm *pb.VM) []ChunkView
	// Hot reports whether any heat of a VM's volumes is known; nil: of all.
	Hot func(vm *pb.VM) bool
	// Stores are all stores in service, used as they will be when what is on its
	// way has arrived. Their Domain is not set.
	Stores []StoreView
	// Sample returns some volumes, other ones at each call; nil: there are none.
	Sample func() []VolumeView
}

// VolumeView is a volume as placement sees it when it evens stores out.
type VolumeView struct {
	ID     uint64
	Name   string
	Home   string // the host that has it attached; "": none, and then its chunks have no heat
	Domain string // label whose values differ between replicas
	Chunks []ChunkView
}

// HostView is a host as placement sees it.
type HostView struct {
	*pb.Host
	Up        bool
	FreeBytes uint64 // on its stores
}

// ChunkView is a chunk as placement sees it.
type ChunkView struct {
	Volume      uint64
	Name        string // of the volume
	Index       uint32
	Domain      string        // label whose values differ between replicas
	Hosts       []string      // with an in-sync replica
	Stores      []ids.StoreID // in the order of Hosts
	Settled     bool          // all its copies are in sync and none is being made
	Bytes       uint64
	Read, Write float64 // decayed bytes
	IdleMs      int64   // nobody has used it for so long; -1: not known. Of samples only
}
