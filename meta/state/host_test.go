package state

import (
	"crypto/sha256"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

func (c *cluster) refused(kind status.Kind, says string, cmd *pb.Command) {
	c.t.Helper()
	res := c.do(cmd)
	if status.Kind(res.Status) != kind || !strings.Contains(res.Detail, says) {
		c.t.Fatalf("%v: %v %q, want %v with %q", cmd.Op, status.Kind(res.Status), res.Detail, kind, says)
	}
}

func register(name, token string) *pb.Command {
	return &pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: name, DataAddr: name + ":1"}, JoinToken: token}}}
}

func drain(name string, yes bool) *pb.Command {
	return &pb.Command{Op: &pb.Command_SetHost{SetHost: &pb.SetHost{Host: name, Drained: yes}}}
}

// What an operator has said of a host or a store stays when it registers again.
func TestRegisteringAgainKeepsDrainedAndRetired(t *testing.T) {
	c := newCluster(t)
	c.ok(drain("host-1", true))
	s := StoreByID(c.kv, storeID(0))
	s.Retired = true
	put(c.kv, key(tStore, s.Id), s)
	c.ok(register("host-1", ""))
	c.ok(&pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: storeID(0), Incarnation: 1, Host: "host-1", CapacityBytes: 1 << 40}}}})
	if !HostByName(c.kv, "host-1").Drained || !StoreByID(c.kv, storeID(0)).Retired {
		t.Fatal("a host that registered again undid what its operator said")
	}
	c.ok(drain("host-1", false))
	if HostByName(c.kv, "host-1").Drained {
		t.Fatal("still drained")
	}
	c.refused(status.NotFound, "no host", drain("host-9", true))
}

func TestANewHostNeedsAToken(t *testing.T) {
	c := newCluster(t)
	c.ok(register("host-4", "")) // no token was ever made: anybody may
	sum := sha256.Sum256([]byte("secret"))
	token := &pb.MakeToken{SecretSha256: sum[:], Uses: 2, ValidSeconds: 60}
	mk := func() *pb.Command { return &pb.Command{Op: &pb.Command_MakeToken{MakeToken: token}} }
	c.ok(mk())
	c.refused(status.Permission, "no join token", register("host-5", ""))
	c.refused(status.Permission, "does not know", register("host-5", "guess"))
	c.ok(register("host-4", "")) // it is known
	c.ok(register("host-5", "secret"))
	c.ok(register("host-5", "secret")) // not another use
	c.ok(register("host-6", "secret"))
	c.refused(status.Permission, "used up", register("host-7", "secret"))
	c.ok(mk())
	late := register("host-7", "secret")
	late.TimeUnixNs = 61e9
	c.refused(status.Permission, "was good until", late)
	token.ValidSeconds = 3600
	c.ok(mk())
	c.ok(&pb.Command{Op: &pb.Command_RevokeToken{RevokeToken: &pb.RevokeToken{SecretSha256: sum[:4]}}})
	c.refused(status.Permission, "revoked", register("host-7", "secret"))
	token.Uses = 0
	c.refused(status.Invalid, "1 to", mk())
}

func TestAHostThatIsNeededStays(t *testing.T) {
	c := newCluster(t)
	rm := func(name string) *pb.Command {
		return &pb.Command{Op: &pb.Command_RemoveHost{RemoveHost: &pb.RemoveHost{Host: name}}}
	}
	c.ok(create("v"))
	v := c.ok(attach("v", "host-1", false)).Volume
	c.ok(allocate(v, v.Epoch, 0))
	c.refused(status.Held, "copy of volume v", rm("host-2"))
	c.ok(register("host-4", ""))
	c.ok(create("w"))
	c.ok(attach("w", "host-4", false))
	c.refused(status.Held, "volume w is attached", rm("host-4"))
	w := c.volume("w")
	c.ok(&pb.Command{Op: &pb.Command_Detach{Detach: &pb.Detach{VolumeId: w.Id, Epoch: w.Epoch}}})
	c.ok(rm("host-4"))
	if HostByName(c.kv, "host-4") != nil {
		t.Fatal("still there")
	}
	c.refused(status.NotFound, "no host", rm("host-4"))
}
