/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */

/* Packets, as programs see them. */
#ifndef KVMETER_SKB_H
#define KVMETER_SKB_H

#include "kernel.h"

#define TC_ACT_UNSPEC (-1) /* linux/pkt_cls.h; TCX_NEXT is the same number: others go on */

#define ETH_HLEN  14
#define VLAN_HLEN 4

#define ETH_P_IP     0x0800
#define ETH_P_IPV6   0x86DD
#define ETH_P_8021Q  0x8100
#define ETH_P_8021AD 0x88A8

#define IPPROTO_TCP 6
#define IPPROTO_UDP 17

/* The context of a traffic-control program, up to what we read of it: offsets
 * are fixed (linux/bpf.h).
 */
struct __sk_buff {
	__u32 len;
	__u32 unread1[4];
	__u32 vlan_present;
	__u32 unread2[4];
	__u32 ifindex;
	__u32 unread3[30];
	__u32 gso_segs;
	__u64 sk;
	__u32 gso_size;
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct net_device {
	int ifindex;
};

struct sk_buff {
	struct net_device *dev;
};

#pragma clang attribute pop

#endif
