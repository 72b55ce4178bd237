package state

import (
	"bytes"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
)

// Hint says what a changed pair means to somebody who watches; nil: nothing. A
// volume that only got chunks is no news: its holder has asked for them.
func Hint(k, old, val []byte) *pb.Change {
	gone := val == nil
	switch k[0] {
	case tVolume:
		if old != nil && !gone && onlyChunks(old, val) {
			return nil
		}
		return &pb.Change{What: &pb.Change_Volume{Volume: u64(k[1:])}, Gone: gone}
	case tHost:
		return &pb.Change{What: &pb.Change_Host{Host: string(k[1:])}, Gone: gone}
	case tStore:
		return &pb.Change{What: &pb.Change_Store{Store: bytes.Clone(k[1:])}, Gone: gone}
	case tVM:
		return &pb.Change{What: &pb.Change_Vm{Vm: string(k[1:])}, Gone: gone}
	case tEvent:
		if gone { // it grew old
			return nil
		}
		return &pb.Change{What: &pb.Change_Event{Event: u64(k[1:])}}
	case tWaste:
		if gone {
			return nil
		}
		return &pb.Change{What: &pb.Change_Waste{Waste: bytes.Clone(k[1:17])}}
	case tTenant:
		return &pb.Change{What: &pb.Change_Tenant{Tenant: string(k[1:])}, Gone: gone}
	}
	return nil
}

func onlyChunks(old, val []byte) bool {
	var a, b pb.Volume
	decode(old, &a)
	decode(val, &b)
	a.ChunkCount = b.ChunkCount
	return proto.Equal(&a, &b)
}
