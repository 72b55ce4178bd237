package state

import (
	"bytes"
	"crypto/sha256"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Bounds of join tokens.
const (
	maxTokens     = 256
	maxTokenUses  = 10_000
	maxTokenValid = int64(365 * 24 * 3600) // seconds
)

// Tokens returns what is known of join tokens; never a secret.
func Tokens(kv KV) []*pb.JoinToken { return all[pb.JoinToken](kv, key(tToken), nil, 0) }

// checkJoin lets a host in that is not known: once the cluster has ever made a
// token, with one that is good.
func (a *apply) checkJoin(host, secret string) (*pb.JoinToken, error) {
	if secret == "" {
		if a.kv.Get(key(tMeta, "tokens")) == nil {
			return nil, nil
		}
		return nil, status.Errorf(status.Permission, "host %s is new and brings no join token: make one with `cairn host token` and put it into its configuration", host)
	}
	sum := sha256.Sum256([]byte(secret))
	t := one[pb.JoinToken](a.kv, key(tToken, sum[:]))
	switch {
	case t == nil:
		return nil, status.Errorf(status.Permission, "host %s brings a join token this cluster does not know, or one that was revoked or used up: make another with `cairn host token`", host)
	case a.now > t.UntilUnixNs:
		return nil, status.Errorf(status.Permission, "the join token of host %s was good until %s: make another with `cairn host token`", host, stamp(t.UntilUnixNs))
	}
	return t, nil
}

// useToken counts one use, and forgets a token that is used up.
func (a *apply) useToken(t *pb.JoinToken) {
	if t == nil {
		return
	}
	if t.UsesLeft--; t.UsesLeft == 0 {
		a.kv.Delete(key(tToken, t.SecretSha256))
		return
	}
	put(a.kv, key(tToken, t.SecretSha256), t)
}

func (a *apply) makeToken(op *pb.MakeToken) (*pb.Result, error) {
	if len(op.SecretSha256) != sha256.Size || op.Uses == 0 || op.Uses > maxTokenUses || op.ValidSeconds <= 0 || op.ValidSeconds > maxTokenValid {
		return nil, status.Errorf(status.Invalid, "a join token is for 1 to %d hosts and good for at most a year", maxTokenUses)
	}
	old := Tokens(a.kv)
	for _, t := range old { // nobody can use these any more
		if t.UntilUnixNs < a.now {
			a.kv.Delete(key(tToken, t.SecretSha256))
		}
	}
	if len(old) >= maxTokens && old[0].UntilUnixNs >= a.now {
		return nil, status.Errorf(status.TooBig, "there are %d join tokens already: revoke some with `cairn host token --revoke`", len(old))
	}
	t := &pb.JoinToken{SecretSha256: op.SecretSha256, UsesLeft: op.Uses, UntilUnixNs: a.now + op.ValidSeconds*1e9, Who: a.who}
	put(a.kv, key(tToken, t.SecretSha256), t)
	a.kv.Set(key(tMeta, "tokens"), []byte{1}) // from now on a new host needs one
	a.event("join token %x made for %d hosts", t.SecretSha256[:4], op.Uses)
	return &pb.Result{}, nil
}

func (a *apply) revokeToken(op *pb.RevokeToken) (*pb.Result, error) {
	n := 0
	for _, t := range Tokens(a.kv) {
		if len(op.SecretSha256) == 0 || bytes.HasPrefix(t.SecretSha256, op.SecretSha256) {
			a.kv.Delete(key(tToken, t.SecretSha256))
			n++
		}
	}
	if n == 0 {
		return nil, status.Errorf(status.NotFound, "there is no such join token: `cairn events` names those that were made; \"all\" revokes every one")
	}
	a.event("%d join tokens revoked", n)
	return &pb.Result{}, nil
}

func (a *apply) registerHost(op *pb.RegisterHost) (*pb.Result, error) {
	h := op.GetHost()
	if !validName(h.GetName()) {
		return nil, badName("host", h.GetName())
	}
	old := HostByName(a.kv, h.Name)
	if old == nil {
		t, err := a.checkJoin(h.Name, op.JoinToken)
		if err != nil {
			return nil, err
		}
		a.useToken(t)
	}
	h = proto.Clone(h).(*pb.Host)
	h.Drained = old.GetDrained() // an operator's word, not the host's
	put(a.kv, key(tHost, h.Name), h)
	if old == nil {
		a.event("host %s joined at %s", h.Name, h.DataAddr)
		return &pb.Result{}, nil
	}
	if old.DataAddr == h.DataAddr {
		return &pb.Result{}, nil
	}
	a.event("host %s moved to %s", h.Name, h.DataAddr)
	for _, s := range Stores(a.kv) {
		if s.Host == h.Name {
			a.eachUser(s.Id, func(m *pb.Member) bool { m.DataAddr = h.DataAddr; return false })
		}
	}
	return &pb.Result{}, nil
}

func (a *apply) setHost(op *pb.SetHost) (*pb.Result, error) {
	h := HostByName(a.kv, op.Host)
	if h == nil {
		return nil, status.Errorf(status.NotFound, "there is no host %q: `cairn host ls` lists them", op.Host)
	}
	if h.Drained == op.Drained {
		return &pb.Result{}, nil
	}
	h.Drained = op.Drained
	put(a.kv, key(tHost, h.Name), h)
	if h.Drained {
		a.event("host %s drained: it gets nothing new", h.Name)
	} else {
		a.event("host %s takes part again", h.Name)
	}
	return &pb.Result{}, nil
}

func (a *apply) removeHost(op *pb.RemoveHost) (*pb.Result, error) {
	h := HostByName(a.kv, op.Host)
	if h == nil {
		return nil, status.Errorf(status.NotFound, "there is no host %q: `cairn host ls` lists them", op.Host)
	}
	var stores [][]byte
	for _, s := range Stores(a.kv) {
		if s.Host == h.Name {
			stores = append(stores, s.Id)
		}
	}
	for _, id := range stores {
		if user := a.userOf(id); user != nil {
			return nil, status.Errorf(status.Held, "host %s cannot be removed: its store %x has a copy of volume %s; drain it and wait until its copies are elsewhere", h.Name, id[:4], user.Name)
		}
	}
	for _, vm := range VMs(a.kv) {
		if vm.Host == h.Name {
			return nil, status.Errorf(status.Held, "host %s cannot be removed: VM %s belongs there; move or remove it first", h.Name, vm.Name)
		}
	}
	if v := a.heldBy(h.Name); v != nil {
		return nil, status.Errorf(status.Held, "host %s cannot be removed: volume %s is attached there; detach it first", h.Name, v.Name)
	}
	for _, id := range stores {
		a.setStore(id, nil)
	}
	a.kv.Delete(key(tHost, h.Name))
	a.event("host %s removed with %d stores", h.Name, len(stores))
	return &pb.Result{}, nil
}

// userOf returns a volume that has a store as a member, or nil.
func (a *apply) userOf(store []byte) (user *pb.Volume) {
	a.kv.Scan(key(tUse, store), nil, func(k, _ []byte) bool {
		user = VolumeByID(a.kv, u64(k[17:]))
		return user == nil
	})
	return user
}

// heldBy returns a volume that a host has attached, or nil. O(volumes).
func (a *apply) heldBy(host string) (held *pb.Volume) {
	a.kv.Scan(key(tVolume), nil, func(_, b []byte) bool {
		v := &pb.Volume{}
		decode(b, v)
		if v.HolderHost == host && v.HolderSession != "" {
			held = v
		}
		return held == nil
	})
	return held
}

// note logs what was done outside of the state.
func (a *apply) note(op *pb.Note) (*pb.Result, error) {
	if op.What == "" || len(op.What)+len(op.Outcome) > maxTextBytes {
		return nil, status.Errorf(status.Invalid, "a note for the event log is 1 to %d bytes", maxTextBytes)
	}
	a.log(op.What, op.Outcome)
	return &pb.Result{}, nil
}
