"""What a Flower client adds: align to the anchor, collect statistics, probe the barrier, build the reply."""

from fedbasin.client.mod import basin as basin
from fedbasin.client.reply import build_reply as build_reply
from fedbasin.client.request import read_request as read_request
