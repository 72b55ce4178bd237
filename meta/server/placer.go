// Package server is one node of the metadata service: the shell around
// meta/state.
//
// Duty: raft on TCP, its log and snapshots on disk, the state in Badger; the
// calls of clients and hosts, answered by the leader; leases and liveness in
// the leader's memory. Floor: F3. It does not decide what a mutation does
// (meta/state) nor where chunks and VMs go (a Placer).
package server

import "github.com/cairnstore/cairn/proto/ids"

// Placer decides where chunks and VMs go. It is pure: everything it may use is
// in the request. The leader asks it; the state machine checks its answer.
type Placer interface {
	// PlaceChunks returns req.Replicas stores of distinct domains for each of
	// req.Count chunks, at least one of them up.
	PlaceChunks(req ChunkRequest) ([][]ids.StoreID, error)
	// PlaceVM returns the best host and a sentence saying why.
	PlaceVM(req VMRequest) (host, reason string, err error)
}

// ChunkRequest asks for places of new chunks of one volume.
type ChunkRequest struct {
	Volume     ids.VolumeID // tells apart volumes that ask between two heartbeats
	Count      int
	Replicas   int
	ChunkBytes uint64
	PreferHost string // the writer's host: its own store first
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
}

// VMRequest asks for a host for a VM.
type VMRequest struct {
	Name        string
	CPUs        uint32
	MemoryBytes uint64
	Hosts       []HostView
}

// HostView is a host as placement sees it. Used is what VMs wanting to run
// there ask for.
type HostView struct {
	Name        string
	Up          bool
	CPUs        uint32
	MemoryBytes uint64
	UsedCPUs    uint32
	UsedMemory  uint64
	LocalBytes  uint64 // of the VM's volumes, in sync on this host
}
