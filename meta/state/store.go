package state

import (
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// The classes of stores: new chunks go to fast ones, cold ones to slow ones.
const (
	ClassFast = "fast"
	ClassSlow = "slow"
)

// ClassOf returns a store's class.
func ClassOf(s *pb.Store) string {
	if s.GetClass() == "" {
		return ClassFast
	}
	return s.Class
}

// maybeOlder refuses a store that may be an older copy of the one that is known:
// its file was restored, or two of it exist. A life is registered before it
// serves, so the same store never comes twice with the same one; and a copy that
// another host opens may lack what its own host has seen since. It is let in
// with another incarnation: then nothing it holds is believed.
func maybeOlder(old, s *pb.Store) error {
	if old == nil || s.Life == 0 || old.Incarnation != s.Incarnation {
		return nil
	}
	if old.Host != s.Host {
		return status.Errorf(status.Conflict, "store %x was on host %s and is on host %s now: it may be an older copy, and needs another incarnation", s.Id[:4], old.Host, s.Host)
	}
	if s.Life <= old.Life {
		return status.Errorf(status.Conflict, "store %x comes in its life %d and was in life %d already: it is an older copy, and needs another incarnation", s.Id[:4], s.Life, old.Life)
	}
	return nil
}

// retireStore takes a store out of service or back. Its chunks are moved by
// whoever holds their volumes; `cairn store show` tells how many are left.
func (a *apply) retireStore(op *pb.RetireStore) (*pb.Result, error) {
	s := StoreByID(a.kv, op.Store)
	if s == nil {
		return nil, status.Errorf(status.NotFound, "there is no store %x: `cairn store ls` lists them", op.Store)
	}
	if s.Retired == op.Retired {
		return &pb.Result{}, nil
	}
	s.Retired = op.Retired
	a.setStore(s.Id, s)
	if s.Retired {
		a.event("store %x on host %s retired: its copies go elsewhere", s.Id[:4], s.Host)
	} else {
		a.event("store %x on host %s is in service again", s.Id[:4], s.Host)
	}
	return &pb.Result{}, nil
}

// removeStore forgets a store that nothing is left on. What it was to drop stays
// noted: should its disk come back, it hears of that.
func (a *apply) removeStore(op *pb.RemoveStore) (*pb.Result, error) {
	s := StoreByID(a.kv, op.Store)
	if s == nil {
		return nil, status.Errorf(status.NotFound, "there is no store %x: `cairn store ls` lists them", op.Store)
	}
	if !s.Retired {
		return nil, status.Errorf(status.Conflict, "store %x on host %s is in service: `cairn store retire %x` first, and wait until its copies are elsewhere", s.Id[:4], s.Host, s.Id[:4])
	}
	if user := a.userOf(s.Id); user != nil {
		return nil, status.Errorf(status.Held, "store %x on host %s still has a copy of volume %s: it goes elsewhere by itself, if there is room", s.Id[:4], s.Host, user.Name)
	}
	a.setStore(s.Id, nil)
	a.event("store %x of host %s removed", s.Id[:4], s.Host)
	return &pb.Result{}, nil
}
